"""Protocols of a scorer and of its spec class, and the reply that it scores.

A scorer is one file of this folder with a spec class, a `ScorerKind` for its entry under `scorers:`, which builds the
`Scorer`: functions in a `ScoreFunction`, or a class. `load.ScorerSpec` lists the spec classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from pydantic import Field

from graftwork.datasets.rows import DatasetRow
from graftwork.metrics import Metric
from graftwork.scoring import AnswerSchema


@dataclass(frozen=True, slots=True)
class ModelReply:
    """An answer with the data to score it; times in ms. Live traffic has no gold."""

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

    def check(self, row: DatasetRow, /) -> object:
        """Raises DataError for a row whose answers cannot be scored."""

    def score(self, reply: ModelReply, /) -> dict[str, float]:
        """A value for each metric; NaN where a measure was not taken."""


@dataclass(frozen=True)
class ScoreFunction:
    """Scorer made of functions."""

    metrics: tuple[Metric, ...]
    score: Callable[[ModelReply], dict[str, float]]
    check: Callable[[DatasetRow], object] = lambda _row: None  # any row will do


class ScorerKind(Protocol):
    """Entry under `scorers:` of a spec."""

    @property
    def kind(self) -> str: ...

    @property
    def needs_gold(self) -> bool:
        """Return whether rows need right answers, which live traffic does not have."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, before anything is loaded; empty where only the loaded scorer has them."""

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer. schema: the spec's answer_schema. Raises ConfigError, StorageError."""


MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")]
