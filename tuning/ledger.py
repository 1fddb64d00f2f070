"""The trials of one sweep on disk: `trials.json`, replaced whole at each change. A killed driver forgets nothing."""

from dataclasses import asdict, replace
from typing import Any

from graftwork.storage import RunPaths
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.search.protocol import Search, Suggestion, Wait
from graftwork.tuning.space import digest

TRIALS = "trials.json"


class Ledger:
    """The trials in the order in which they were chosen. The driver alone writes it."""

    def __init__(self, run: RunPaths) -> None:
        self.run = run
        self.records: dict[str, TrialRecord] = {}

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """In the order in which they were chosen."""
        return tuple(self.records.values())

    def resume(self, *, failed_too: bool = False) -> None:
        """Take over the trials of earlier attempts; those that did not end (without `failed_too` the failed ones as
        well) are pending again, with their values."""
        if not self.run.store.exists(*self.run.file(TRIALS)):
            return
        for tree in self.run.store.read_json(*self.run.file(TRIALS))["trials"]:
            record = TrialRecord.from_json(tree)
            keep = record.ended or (failed_too and record.state == "failed")
            self.records[record.trial_id] = record if keep else TrialRecord(record.trial_id, record.values)

    def next(self, search: Search) -> TrialRecord | Wait | None:
        """The next trial to start: one that is pending, else what the search suggests; None when there is no more."""
        for record in self.trials:
            if record.state == "pending":
                return record
        chosen = search.suggest(self.trials)
        return self._add(chosen) if isinstance(chosen, Suggestion) else chosen

    def update(self, trial_id: str, **changes: Any) -> None:
        """Change fields of one trial and write all."""
        self.records[trial_id] = replace(self.records[trial_id], **changes)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        trials = [asdict(record) for record in self.records.values()]
        self.run.store.write_json({"trials": trials}, *self.run.file(TRIALS))

    def _add(self, chosen: Suggestion) -> TrialRecord:
        record = TrialRecord(digest(chosen.values), chosen.values)
        assert record.trial_id not in self.records, "a search repeats no point"
        self.records[record.trial_id] = record
        return record
