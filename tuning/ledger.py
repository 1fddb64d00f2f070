"""The trials of one sweep on disk: `trials.json`, replaced whole at each change. A killed driver forgets nothing."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from graftwork.storage import RunPaths
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.space import Values, digest

TRIALS = "trials.json"


class Ledger:
    """The trials in draw order. The driver alone writes it."""

    def __init__(self, run: RunPaths, points: Iterable[Values]) -> None:
        self.run = run
        self.records = {digest(point): TrialRecord(digest(point), point) for point in points}

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """In draw order."""
        return tuple(self.records.values())

    def resume(self, *, failed_too: bool = False) -> None:
        """Take over the trials that ended in earlier attempts (with `failed_too` the failed ones as well)."""
        if not self.run.store.exists(*self.run.file(TRIALS)):
            return
        for tree in self.run.store.read_json(*self.run.file(TRIALS))["trials"]:
            record = TrialRecord.from_json(tree)
            if record.ended or (failed_too and record.state == "failed"):
                self.records[record.trial_id] = record

    def update(self, trial_id: str, **changes: Any) -> None:
        """Change fields of one trial and write all."""
        self.records[trial_id] = replace(self.records[trial_id], **changes)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        trials = [asdict(record) for record in self.records.values()]
        self.run.store.write_json({"trials": trials}, *self.run.file(TRIALS))
