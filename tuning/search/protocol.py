"""What a search is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from graftwork.tuning.records import TrialRecord
from graftwork.tuning.space import Values


@dataclass(frozen=True)
class Suggestion:
    """The next trial."""

    values: Values
    repeat_of: str | None = None
    """The trial that this one repeats with another seed."""
    parent: str | None = None
    """The trial whose last checkpoint this one begins from."""
    until: int | None = None
    """Optimizer step that it ends at; None: the sweep's last."""


class Wait:
    """Nothing can be chosen before a running trial has ended."""


class Search(Protocol):
    """Chooses the next point. It holds no state: what it chooses follows from the spec, its seed and `trials` alone, so
    that a sweep that goes on after a kill chooses as it would have."""

    @property
    def name(self) -> str:
        """As in the spec: grid, random, tpe, ..."""
        ...

    @property
    def total(self) -> int:
        """Trials that it will choose in all, at most."""
        ...

    @property
    def reason(self) -> str:
        """What it does here, in words."""
        ...

    def suggest(self, trials: Sequence[TrialRecord]) -> Suggestion | Wait | None:
        """The trial after `trials` (all of the sweep, in the order in which they were chosen); None: there is no more.

        Raises ConfigError when the values contradict each other.
        """
        ...


def select_searched(trials: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """The trials that a search has chosen: repeats of finalists are not."""
    return tuple(trial for trial in trials if trial.repeat_of is None)
