"""Which scorers a spec may name under `scorers:`, each with its keys. `- exact` is short for `- {kind: exact}`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BeforeValidator, Field, model_validator

from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow
from graftwork.metrics import Metric
from graftwork.scoring import Pattern
from graftwork.storage.store import NAME_PATTERN

# One answer and what it is held against, and what a scorer is.


@dataclass(frozen=True, slots=True)
class ModelReply:
    """An answer that came; times in ms. Live traffic has no gold."""

    text: str
    gold: Mapping[str, Any] | None = None
    given_fields: tuple[str, ...] = ()
    """Fields of gold that the question gives away."""
    reference: str | None = None
    """The right answer as a text, where the row ends with one."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    latency_ms: float | None = None
    row: DatasetRow | None = None
    likelihoods: Mapping[str, Sequence[tuple[float, int]]] = field(default_factory=dict)
    """By choice scorer: (log probability, tokens) of each option."""

    @classmethod
    def to(cls, row: DatasetRow, text: str, **more: Any) -> "ModelReply":
        """An answer to an evaluation row."""
        return cls(text, row.gold, row.given_fields, row.answer, row=row, **more)


class Scorer(Protocol):
    """Scores one answer on the metrics that it names. Pure: the same reply gives the same numbers."""

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def needs_gold(self) -> bool: ...

    def check(self, row: DatasetRow) -> None:
        """Raises DataError for a row that no answer can be held against."""

    def score(self, reply: ModelReply) -> dict[str, float]:
        """A value for each metric; NaN where a measure was not taken."""


MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")]


class FieldsSpec(Spec):
    """form, facts, both, field_accuracy: a JSON answer against the gold object."""

    kind: Literal["fields"]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("facts", "form", "both", "field_accuracy")


class ExactSpec(Spec):
    """The answer is the gold text."""

    kind: Literal["exact"]
    name: MetricName = "exact"
    field: str | None = None
    """Field of gold with the right text, or several of them; null takes the last assistant turn, else gold's only
    field."""
    ignore_case: bool = False
    """Compare words alone: case, accents, punctuation and the way a number is written do not count."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)


class QaSpec(Spec):
    """em, f1, contains: a short text answer against one or more right texts, as SQuAD does it."""

    kind: Literal["qa"]
    field: str | None = None
    """As for exact: a list in gold gives several right texts, and the best match counts."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("em", "f1", "contains")


class FieldF1Spec(Spec):
    """F1 over the fields of a JSON answer."""

    kind: Literal["field_f1"]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("field_f1",)


class JsonSchemaSpec(Spec):
    """The answer is one JSON object that validates. Needs no gold."""

    kind: Literal["json_schema"]
    name: MetricName = "json_schema"
    json_schema: str | None = None
    """A path, `file://`, `s3://` or `recipe://NAME/FILE`; null takes the spec's answer_schema."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)


class RegexSpec(Spec):
    """The answer matches a regular expression. Needs no gold."""

    kind: Literal["regex"]
    name: MetricName = "regex"
    pattern: Pattern
    """Python's syntax."""
    whole: bool = True
    """It matches the whole answer, not only somewhere in it."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)


class SqlSpec(Spec):
    """The answer is a query that finds the same rows as the gold query, on sqlite in memory, read-only."""

    kind: Literal["sql"]
    name: MetricName = "sql"
    field: str = "sql"
    """Field of gold with the right query."""
    setup_field: str | None = "setup"
    """Field of gold with the statements that make the row's tables; null where `setup` has them for all rows."""
    setup: str | None = None
    """SQL file run before a row's own: a path, `file://`, `s3://`."""
    max_steps: int = Field(default=5_000_000, ge=1000)
    """Steps of sqlite's machine that a query may take, about 10 million a second: the same bound on any machine."""
    max_rows: int = Field(default=10_000, ge=1)
    """Rows that a query may return."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)


class OverlapSpec(Spec):
    """Likeness to the gold text. bleu and chrf need `pip install 'sacrebleu>=2.6,<3'`."""

    kind: Literal["bleu", "chrf", "rouge"]
    field: str | None = None
    """As for exact."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("rouge_1", "rouge_2", "rouge_l") if self.kind == "rouge" else (self.kind,)


class ChoiceSpec(Spec):
    """The likeliest of given options is the right one. Costs a prefill an option, and no decoding."""

    kind: Literal["choice"]
    name: MetricName = "choice"
    field: str = "answer"
    """Field of gold with the right option's text."""
    options: tuple[str, ...] = ()
    """The options of every row."""
    options_field: str | None = None
    """Field of gold with the row's own options."""
    per_token: bool = True
    """Compare by log probability per token, so that a long option is not the worse for it."""

    @model_validator(mode="after")
    def _has_options(self) -> Self:
        if bool(self.options) == (self.options_field is not None):
            raise ValueError("choice needs options or options_field, one of the two")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)


class LatencySpec(Spec):
    """Milliseconds to the first and to the last token. A comparison times each arm alone, one request in flight, on a
    few questions, and tests no difference.
    """

    kind: Literal["latency"]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("latency_ms", "ttft_ms")


class TokensSpec(Spec):
    """Tokens of the prompt and of the answer."""

    kind: Literal["tokens"]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("prompt_tokens", "completion_tokens")


class CostSpec(Spec):
    """What 1,000 answers cost, by these prices."""

    kind: Literal["cost"]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    per_1k_prompt_tokens: float = Field(default=0.0, ge=0)
    per_1k_completion_tokens: float = Field(default=0.0, ge=0)
    per_replica_hour: float = Field(default=0.0, ge=0)
    """Paid for the time that an answer takes, divided by the answers that a replica gives at once."""
    answers_at_once: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if not (self.per_1k_prompt_tokens or self.per_1k_completion_tokens or self.per_replica_hour):
            raise ValueError("cost needs a price: per_1k_prompt_tokens, per_1k_completion_tokens or per_replica_hour")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("cost",)


class OwnSpec(Spec):
    """A scorer of an installed package, entry point group `graftwork.scorers`. Only what is named here is loaded."""

    kind: Literal["own"]
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Name of the entry point."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ()


def _short_form(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


ScorerSpec = Annotated[
    FieldsSpec
    | ExactSpec
    | QaSpec
    | FieldF1Spec
    | JsonSchemaSpec
    | RegexSpec
    | SqlSpec
    | OverlapSpec
    | ChoiceSpec
    | LatencySpec
    | TokensSpec
    | CostSpec
    | OwnSpec,
    Field(discriminator="kind"),
    BeforeValidator(_short_form),
]
