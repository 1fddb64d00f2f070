"""Where the trials of a sweep keep checkpoints while they run: runs/<sweep>/trials/<trial_id>/checkpoints/."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftwork.storage import RunPaths
from graftwork.training.job import TrainJob
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.search.pbt import finished_trials

TRIALS = "trials"


@dataclass(frozen=True)
class TrialPaths:
    """The places of all trials of one sweep."""

    sweep: RunPaths
    every: int | None
    """Optimizer steps between checkpoints; None: none but at the end of a segment."""

    def job(self, job: TrainJob, trial_id: str, until: int | None, parent: str | None) -> TrainJob:
        """The job of a trial, with a place for its checkpoints where it makes any."""
        if self.every is None and until is None:
            return job
        kept = {"checkpoint_every": self.every or job.max_steps, "checkpoints": {"keep_last": 1}}
        begin_from = self.sweep.part(TRIALS, parent) if parent is not None else None
        own = self.sweep.part(TRIALS, trial_id)
        return replace(job, spec=job.spec.with_(kept), run=own, begin_from=begin_from)

    def tidy(self, trials: Sequence[TrialRecord]) -> None:
        """Remove the checkpoints that nobody goes on from any more. Raises StorageError."""
        if self.every is None and all(trial.until is None for trial in trials):
            return
        for trial_id in finished_trials(trials) & set(self.sweep.store.list(*self.sweep.file(TRIALS))):
            self.sweep.store.delete(*self.sweep.file(TRIALS, trial_id))

    def clear(self) -> None:
        """Remove all: the sweep is over. Raises StorageError."""
        self.sweep.store.delete(*self.sweep.file(TRIALS))
