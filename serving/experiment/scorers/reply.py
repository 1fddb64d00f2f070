"""One answer and what it is held against, and what a scorer is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from graftwork.data import Row
from graftwork.errors import DataError
from graftwork.metrics import Metric


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that came; times in ms. Live traffic has no gold."""

    text: str
    gold: Mapping[str, Any] | None = None
    asked: tuple[str, ...] = ()
    """Fields of gold that the question gives away."""
    reference: str | None = None
    """The right answer as a text, where the row ends with one."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    latency_ms: float | None = None
    row: Row | None = None
    likelihoods: Mapping[str, Sequence[tuple[float, int]]] = field(default_factory=dict)
    """By choice scorer: (log probability, tokens) of each option."""

    @classmethod
    def to(cls, row: Row, text: str, **more: Any) -> "Reply":
        """An answer to an evaluation row."""
        return cls(text, row.gold, row.asked, row.answer, row=row, **more)


class Scorer(Protocol):
    """Scores one answer on the metrics that it names. Pure: the same reply gives the same numbers."""

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def needs_gold(self) -> bool: ...

    def check(self, row: Row) -> None:
        """Raises DataError for a row that no answer can be held against."""

    def score(self, reply: Reply) -> dict[str, float]:
        """A value for each metric; NaN where a measure was not taken."""


@dataclass(frozen=True)
class GoldText:
    """Where the right text of a row is."""

    field: str | None

    def of(self, gold: Mapping[str, Any] | None, reference: str | None, row: str = "") -> tuple[str, ...]:
        """The right texts: any of them will do. Raises DataError where there is none."""
        if self.field is None and reference is not None:
            return (reference,)
        found = self._value(gold or {})
        texts = found if isinstance(found, list) else [found]
        if not texts or not all(isinstance(text, str | int | float) and str(text).strip() for text in texts):
            raise DataError(f"row {row!r}: gold" + (f".{self.field}" if self.field else ""), f"found {found!r}",
                            "the right text is a string, or a list of them",
                            "name the scorer's `field`, or end the row with the right answer")  # fmt: skip
        return tuple(str(text) for text in texts)

    def _value(self, gold: Mapping[str, Any]) -> Any:
        if self.field is not None:
            return gold.get(self.field)
        return next(iter(gold.values())) if len(gold) == 1 else None
