"""What is known of each trial, in memory and in `trials.json`, and the rule that picks the best."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from graftwork.errors import RunError
from graftwork.storage import RunPaths
from graftwork.tuning.space import Values, digest

State = Literal["pending", "running", "finished", "stopped", "failed"]
"""finished: reached its last step. stopped: by the scheduler. failed: an error, or a loss that is not finite."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial. `trial_id` is the digest of its values."""

    trial_id: str
    values: Values
    losses: tuple[tuple[int, float], ...] = ()
    """(optimizer step, held-out loss in nats per trained token) at each report."""
    state: State = "pending"
    steps: int = 0
    """Optimizer steps of the last report."""
    wall_s: float = 0.0
    """From the start of its process, loading the base included."""
    peak_rss_bytes: int = 0
    """Largest resident set of its process at a report."""
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Finished or stopped: a rerun of the sweep does not repeat it."""
        return self.state in ("finished", "stopped")

    @property
    def last_loss(self) -> float | None:
        """Held-out loss at the last report."""
        return self.losses[-1][1] if self.losses else None

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Back from `trials.json`."""
        return cls(**{**tree, "losses": tuple((int(step), float(loss)) for step, loss in tree["losses"])})


def choose(trials: Sequence[TrialRecord], steps: int) -> TrialRecord:
    """The trial with the lowest held-out loss at step `steps`, among those that ran to their end.

    A stopped trial can't win: its last loss stands at an earlier step. Equal losses: the earlier trial.
    Raises RunError when no trial ran to its end.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    if not finished:
        errors = {trial.error for trial in trials if trial.error}
        raise RunError(
            f"a sweep of {len(trials)} trials",
            f"none ran to step {steps}: {_count(trials)}" + (f"; {min(errors)}" if errors else ""),
            "the best trial is one that ran to its end",
            "lower the learning rates in `space`, or set `scheduler: null` if the survivors failed; then run it again",
        )
    return min(finished, key=lambda trial: trial.losses[-1][1])


def rule(steps: int) -> str:
    """How the best was chosen, in words."""
    return f"lowest held-out loss at step {steps} among the trials that ran to their end"


class Ledger:
    """The trials of one sweep in draw order; each change is on disk, whole, before the next step of the sweep."""

    def __init__(self, run: RunPaths, points: Iterable[Values]) -> None:
        self.run = run
        self.records = {digest(point): TrialRecord(digest(point), point) for point in points}

    def resume(self) -> int:
        """Take over the trials that ended in an earlier attempt; all others start again. Returns how many."""
        if not self.run.store.exists(*self.run.file("trials.json")):
            return 0
        for tree in self.run.store.read_json(*self.run.file("trials.json"))["trials"]:
            record = TrialRecord.from_json(tree)
            if record.ended and record.trial_id in self.records:
                self.records[record.trial_id] = record
        return sum(record.ended for record in self.records.values())

    def restore(self) -> None:
        """Take over every trial of a sweep that is done, failed ones included."""
        for tree in self.run.store.read_json(*self.run.file("trials.json"))["trials"]:
            self.records[tree["trial_id"]] = TrialRecord.from_json(tree)

    def update(self, trial_id: str, **changes: Any) -> TrialRecord:
        """Change fields of one trial and write all."""
        self.records[trial_id] = dataclasses.replace(self.records[trial_id], **changes)
        self.write()
        return self.records[trial_id]

    def write(self) -> None:
        """Replace `trials.json`."""
        trials = [dataclasses.asdict(record) for record in self.records.values()]
        self.run.store.write_json({"trials": trials}, *self.run.file("trials.json"))

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """In draw order."""
        return tuple(self.records.values())


def _count(trials: Sequence[TrialRecord]) -> str:
    states = [trial.state for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
