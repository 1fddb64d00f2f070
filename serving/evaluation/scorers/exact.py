"""Exact match, SQuAD's text scores, field F1, and two forms that need no gold: a JSON schema, a regular expression."""

from dataclasses import dataclass

from graftwork.datasets.rows import DatasetRow
from graftwork.errors import DataError
from graftwork.metrics import CONTAINS, EM, F1, FIELD_F1, SCORES, Metric
from graftwork.scoring import (
    AnswerSchema,
    GoldAnswer,
    GoldText,
    TextMatch,
    field_f1,
    matches,
    parse_object,
    same_text,
    score,
)
from graftwork.serving.evaluation.scorers.spec import ExactSpec, ModelReply, QaSpec, RegexSpec


class ExactScorer:
    """1 where the answer is one of the right texts."""

    needs_gold = True

    def __init__(self, spec: ExactSpec) -> None:
        self._gold, self._loose = GoldText(spec.field), spec.ignore_case
        how = "word for word, whatever the case and punctuation" if self._loose else "but for outer whitespace"
        self.metrics = (
            Metric(spec.name, "share of answers", "higher", "binary", f"The answer is a right text, {how}."),
        )

    @property
    def name(self) -> str:
        """Name of its metric."""
        return self.metrics[0].name

    def compare(self, text: str, row: DatasetRow) -> TextMatch:
        """Compare a text with the row's right texts as the scorer qa does."""
        return TextMatch.compare(text, self._gold.find_texts(row.gold, row.answer, row.id))

    def check(self, row: DatasetRow) -> None:
        self._gold.find_texts(row.gold, row.answer, row.id)

    def score(self, reply: ModelReply) -> dict[str, float]:
        right = self._gold.find_texts(reply.gold, reply.reference)
        found = any(same_text(reply.text, text, ignore_case=self._loose) for text in right)
        return {self.name: float(found)}


class QaScorer:
    """SQuAD's exact match and F1, and containment; the best over the row's right texts."""

    needs_gold = True
    metrics = (EM, F1, CONTAINS)

    def __init__(self, spec: QaSpec) -> None:
        self._gold = GoldText(spec.field)

    def check(self, row: DatasetRow) -> None:
        self._gold.find_texts(row.gold, row.answer, row.id)

    def score(self, reply: ModelReply) -> dict[str, float]:
        found = TextMatch.compare(reply.text, self._gold.find_texts(reply.gold, reply.reference))
        return {EM.name: float(found.em), F1.name: found.f1, CONTAINS.name: float(found.contains)}


class FieldF1Scorer:
    """Harmonic mean of the share of the answer's fields that are right and the share of gold's that are found."""

    needs_gold = True
    metrics = (FIELD_F1,)

    def check(self, row: DatasetRow) -> None:
        if not row.gold:
            raise DataError(f"row {row.id!r}: gold", "missing or empty", "field_f1 needs an object of fields")

    def score(self, reply: ModelReply) -> dict[str, float]:
        return {FIELD_F1.name: field_f1(parse_object(reply.text) or {}, reply.gold or {})}


@dataclass(frozen=True)
class JsonSchemaScorer:
    """1 where the answer is one JSON object that validates."""

    name: str
    schema: AnswerSchema
    needs_gold = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        meaning = "The answer is exactly one JSON object and validates against the schema."
        return (Metric(self.name, "share of answers", "higher", "binary", meaning),)

    def check(self, row: DatasetRow) -> None:
        """Any row will do."""

    def score(self, reply: ModelReply) -> dict[str, float]:
        answer = parse_object(reply.text)
        return {self.name: float(answer is not None and self.schema.holds(answer))}


class RegexScorer:
    """1 where the answer matches a regular expression."""

    needs_gold = False

    def __init__(self, spec: RegexSpec) -> None:
        self._spec = spec
        where = "The whole answer" if spec.whole else "A part of the answer"
        self.metrics = (
            Metric(spec.name, "share of answers", "higher", "binary", f"{where} matches `{spec.pattern}`."),
        )

    def check(self, row: DatasetRow) -> None:
        """Any row will do."""

    def score(self, reply: ModelReply) -> dict[str, float]:
        return {self.metrics[0].name: float(matches(reply.text, self._spec.pattern, whole=self._spec.whole))}


# form, facts, both and field_accuracy as a scorer.


class FieldsScorer:
    """Holds an answer against its row's gold object."""

    needs_gold = True
    metrics = SCORES

    def __init__(self, schema: AnswerSchema) -> None:
        self._schema = schema

    def check(self, row: DatasetRow) -> None:
        GoldAnswer.from_row(row)

    def score(self, reply: ModelReply) -> dict[str, float]:
        found = score(reply.text, GoldAnswer(reply.gold or {}, frozenset(reply.given_fields)), self._schema)
        return {metric.name: getattr(found, metric.name) for metric in SCORES}
