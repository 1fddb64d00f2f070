"""The trials of one sweep on disk: `trials.json`, replaced whole at each change. A killed driver forgets nothing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from graftwork.cluster.jobs.fencing import Fence, FenceMonitor
from graftwork.config import Spec
from graftwork.errors import StorageError, StoreUnreachable
from graftwork.storage.store import DEFAULT_ROOT, NAME_PATTERN, RunPaths, Store
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from graftwork.tuning.search import Search, Suggestion, Wait, digest
from graftwork.tuning.search_pbt import finished_trials
from graftwork.tuning.trials import TrialRecord

TRIALS_FILE = "trials.json"


class Ledger:
    """The trials in the order in which they were chosen. The driver alone writes it.

    patience_s: seconds that storage may be out of reach. on_trouble is called when it is, and with "" when it is back.
    """

    def __init__(
        self, run: RunPaths, patience_s: float = 0.0, on_trouble: Callable[[str], None] = lambda _: None
    ) -> None:
        self.run, self._patience_s, self._on_trouble = run, patience_s, on_trouble
        fence = Fence.from_environment()
        self._fence_monitor = FenceMonitor(fence) if fence is not None else None
        self.records: dict[str, TrialRecord] = {}
        self._lines: dict[str, tuple[TrialRecord, str]] = {}

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """In the order in which they were chosen."""
        return tuple(self.records.values())

    def resume(self, *, failed_too: bool = False) -> None:
        """Take over the trials of earlier attempts. Those that did not end are pending again, with their values.

        So are failed ones without `failed_too`, except for those that would fail again. Raises StorageError when the
        file is not as it was written.
        """
        data = self.run.store.find_bytes(*self.run.file(TRIALS_FILE))
        for record in self._parse(data) if data is not None else ():
            keep = record.ended or record.hopeless or (failed_too and record.state == "failed")
            self.records[record.trial_id] = record if keep else _pending(record)

    def next(self, search: Search) -> TrialRecord | Wait | None:
        """The next trial to start: one that is pending, else what the search suggests; None when there is no more."""
        for record in self.trials:
            if record.state == "pending":
                return record
        return self.next_trial(search)

    def next_trial(self, search: Search) -> TrialRecord | Wait | None:
        """What the search suggests, as a pending trial."""
        chosen = search.suggest(self.trials)
        if not isinstance(chosen, Suggestion):
            return chosen
        more = {key: value for key in ("parent", "until") if (value := getattr(chosen, key)) is not None}
        record = TrialRecord(digest({**chosen.values, **more}), **vars(chosen))
        assert record.trial_id not in self.records, "a search repeats no point"
        self.records[record.trial_id] = record
        return record

    def update(self, trial_id: str, **changes: Any) -> None:
        """Change fields of one trial and write all."""
        self.records[trial_id] = replace(self.records[trial_id], **changes)
        self.write()

    def write(self) -> None:
        """Replace the file. Waits out an outage of the store; raises StorageError for a longer one, and
        SupersededError where another attempt of the job is at work."""
        if self._fence_monitor is not None and self._fence_monitor.stop_reason == "superseded":
            self._fence_monitor.fence.require(self._patience_s)
        # A record never changes, so each becomes JSON once: 1,000 trials are written in 2 ms, else in 81 (docs/log.md).
        for trial_id, record in self.records.items():
            known = self._lines.get(trial_id)
            if known is None or known[0] is not record:
                self._lines[trial_id] = (record, json.dumps(asdict(record)))
        lines = ",\n ".join(self._lines[trial_id][1] for trial_id in self.records)
        content, file = f'{{"trials": [\n {lines}\n]}}\n'.encode(), self.run.file(TRIALS_FILE)
        try:
            self.run.store.write_bytes(content, *file)
        except StoreUnreachable:
            self._on_trouble(f"storage is out of reach; trying for {self._patience_s:g} s")
            try:
                self.run.store.with_retries(self._patience_s).write_bytes(content, *file)
            except StoreUnreachable as error:
                raise StoreUnreachable(
                    f"{TRIALS_FILE} of sweep {self.run.run_id}",
                    f"not written for {self._patience_s:g} s: {error.problem}",
                    "storage may be out of reach for train.checkpoints.outage_s seconds",
                    "run the same command when it is back: trials that ended are not repeated, the others run again",
                ) from error
            self._on_trouble("")

    def _parse(self, data: bytes) -> list[TrialRecord]:
        try:
            records = [TrialRecord.from_json(tree) for tree in json.loads(data)["trials"]]
            known = [record.trial_id for record in records]
            if len(set(known)) < len(known):
                raise ValueError(f"trial {max(known, key=known.count)} is there twice")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            where = self.run.store.path(*self.run.file(TRIALS_FILE))
            raise StorageError(
                f"read {where}",
                f"it is not as a sweep writes it: {_error_line(error)}",
                "the trials of a sweep are written whole, by its driver alone",
                "put back the file as it was; or delete it, and the sweep begins again",
            ) from None
        return records


def _pending(record: TrialRecord) -> TrialRecord:
    """To be run again, from its newest checkpoint where it has one; a new driver has its own number of retries."""
    if record.state == "pending":
        return replace(record, retried=0)
    again = replace(record, state="pending", attempts=record.attempts + 1, retried=0, error=None, failure=None)
    if record.state == "running":
        note = f"the sweep ended while it was running, after step {record.steps}; run again"
        return replace(again, notes=(*record.notes, note))
    return replace(again, losses=(), steps=0, smaller=0)


def _error_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {str(first['input'])[:60]!r}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


# Checkpoints of running trials: runs/<sweep>/trials/<trial_id>/checkpoints/.

TRIALS = "trials"


@dataclass(frozen=True)
class TrialPaths:
    """Folders of all trials of one sweep."""

    sweep: RunPaths
    every: int | None
    """Optimizer steps between checkpoints; None: none but at the end of a segment."""

    def job(self, job: TrainJob, trial_id: str, until: int | None, parent: str | None) -> TrainJob:
        """The job of a trial, with a folder for its checkpoints where it makes any."""
        if self.every is None and until is None:
            return job
        keys = {"checkpoint_every": self.every or job.max_steps, "checkpoints": {"keep_last": 1}}
        begin_from = self.sweep.part(TRIALS, parent) if parent is not None else None
        own = self.sweep.part(TRIALS, trial_id)
        return replace(job, spec=job.spec.with_(keys), run=own, begin_from=begin_from)

    def tidy(self, trials: Sequence[TrialRecord]) -> None:
        """Remove the checkpoints from which no trial resumes or begins any more. Raises StorageError."""
        if self.every is None and all(trial.until is None for trial in trials):
            return
        for trial_id in finished_trials(trials) & set(self.sweep.store.list(*self.sweep.file(TRIALS))):
            self.sweep.store.delete(*self.sweep.file(TRIALS, trial_id))

    def clear(self) -> None:
        """Remove all: the sweep is over. Raises StorageError."""
        self.sweep.store.delete(*self.sweep.file(TRIALS))


# A trial of a sweep as a job of its own: what its driver runs, where the sweep's driver is on another machine.


class TrialSpec(Spec):
    """Written by `graftwork tune --trial-target`, run by `graftwork trial`. It publishes nothing."""

    kind: Literal["trial"] = "trial"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """`<sweep>-<trial>`."""
    root: str = DEFAULT_ROOT
    sweep: str
    """Name of the sweep."""
    sweep_digest: str
    """With the name, the folder of the sweep's records."""
    trial_id: str
    train: TrainSpec
    steps: int = Field(ge=1)
    report_every: int = Field(ge=1)

    def paths(self) -> RunPaths:
        """Folder of its steps and checkpoints, in the sweep's run."""
        return RunPaths(Store(self.root), self.sweep, self.sweep_digest).part(TRIALS, self.trial_id)
