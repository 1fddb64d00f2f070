"""Scorers of JSON answers: `fields` and `field_f1` (against gold's fields), `json_schema` (it validates)."""

from typing import ClassVar, Literal

from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, DataError
from graftwork.metrics import FIELD_F1, SCORES, Metric
from graftwork.scoring import AnswerSchema, GoldAnswer, field_f1, parse_object, score
from graftwork.serving.evaluation.scorers.protocol import MetricName, ModelReply, ScoreFunction, Scorer


class FieldsSpec(Spec):
    """form, facts, both, field_accuracy: a JSON answer against the gold object."""

    kind: Literal["fields"]
    needs_gold: ClassVar[bool] = True

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("facts", "form", "both", "field_accuracy")

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the score of form, facts and both."""
        valid = _require_schema(schema, self.kind)

        def score_answer(reply: ModelReply) -> dict[str, float]:
            found = score(reply.text, GoldAnswer(reply.gold or {}, frozenset(reply.given_fields)), valid)
            return {metric.name: getattr(found, metric.name) for metric in SCORES}

        return ScoreFunction(SCORES, score_answer, GoldAnswer.from_row)


class FieldF1Spec(Spec):
    """F1 over the fields of a JSON answer."""

    kind: Literal["field_f1"]
    needs_gold: ClassVar[bool] = True

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("field_f1",)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the harmonic mean of the share of the answer's fields that are right and of gold's that are found."""

        def check(row: DatasetRow) -> None:
            if not row.gold:
                raise DataError(f"row {row.id!r}: gold", "missing or empty", "field_f1 needs an object of fields")

        def score_answer(reply: ModelReply) -> dict[str, float]:
            return {FIELD_F1.name: field_f1(parse_object(reply.text) or {}, reply.gold or {})}

        return ScoreFunction((FIELD_F1,), score_answer, check)


class JsonSchemaSpec(Spec):
    """The answer is one JSON object that validates. Needs no gold."""

    kind: Literal["json_schema"]
    needs_gold: ClassVar[bool] = False
    name: MetricName = "json_schema"
    json_schema: str | None = None
    """A path, `file://`, `s3://` or `recipe://NAME/FILE`; null takes the spec's answer_schema."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return 1 where the answer is one JSON object that validates."""
        own = AnswerSchema.load(self.json_schema) if self.json_schema else _require_schema(schema, self.kind)
        meaning = "The answer is exactly one JSON object and validates against the schema."

        def score_answer(reply: ModelReply) -> dict[str, float]:
            answer = parse_object(reply.text)
            return {self.name: float(answer is not None and own.holds(answer))}

        return ScoreFunction((Metric(self.name, "share of answers", "higher", "binary", meaning),), score_answer)


def _require_schema(schema: AnswerSchema | None, kind: str) -> AnswerSchema:
    if schema is None:
        raise ConfigError(
            f"scorers: kind={kind!r}",
            "there is no schema",
            "it compares answers with answer_schema",
            "set answer_schema",
        )
    return schema
