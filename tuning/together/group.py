"""Which trials go into one process: the first in line, and those that can share its base with it."""

from collections.abc import Callable

from graftwork import base_model
from graftwork.training.data import PreparedData
from graftwork.training.spec import TrainSpec
from graftwork.tuning.finals import knows_all
from graftwork.tuning.ledger import Ledger
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.search import Search
from graftwork.tuning.space import rows_key
from graftwork.tuning.together.rule import can_share, why_alone

SpecOf = Callable[[TrialRecord], TrainSpec]


def group_of(
    first: TrialRecord, most: int, ledger: Ledger, search: Search, spec_of: SpecOf, rows: PreparedData
) -> dict[str, TrainSpec]:
    """The specs of `first` and of at most `most - 1` others, by trial: pending ones, then what the search suggests.

    All are marked as running, so that the search knows of them; a trial that does not fit stays pending. `rows`: those
    of `first`. Raises ConfigError when the values of a point contradict each other.
    """
    group = {first.trial_id: spec_of(first)}
    ledger.update(first.trial_id, state="running")
    reason = _alone(first, group[first.trial_id], rows) if most > 1 else "asked for"
    while len(group) < most and reason is None:
        found = _next_beside(first, group[first.trial_id], ledger, search, spec_of)
        if found is None:
            break
        ledger.update(found.trial_id, state="running")
        group[found.trial_id] = spec_of(found)
    if most > 1:
        _note(ledger, group, reason)
    return group


def _next_beside(
    first: TrialRecord, spec: TrainSpec, ledger: Ledger, search: Search, spec_of: SpecOf
) -> TrialRecord | None:
    """The next trial that can share a process with `first`; where no pending one can, the search is asked: once, or
    while it has more where its points don't depend on results."""

    def fits(other: TrialRecord) -> bool:
        same_rows = rows_key(other.values) == rows_key(first.values)
        return same_rows and not other.smaller and can_share(spec, spec_of(other))

    found = next((record for record in ledger.trials if record.state == "pending" and fits(record)), None)
    waiting = any(record.state == "pending" for record in ledger.trials)
    while found is None and (knows_all(search) or not waiting):
        drawn = ledger.next_trial(search)
        if not isinstance(drawn, TrialRecord):
            break
        found, waiting = (drawn if fits(drawn) else None), True
    return found


def _alone(first: TrialRecord, spec: TrainSpec, rows: PreparedData) -> str | None:
    if first.smaller:
        return "it ran out of memory before"
    if rows.trained_tokens:
        return "rows of the embedding are trained beside the adapter"
    return why_alone(spec, base_model.resolve(spec.base).config)


def _note(ledger: Ledger, group: dict[str, TrainSpec], reason: str | None) -> None:
    """What a reader of the record should know: who shared its process, or why nobody did."""
    for trial_id in group:
        others = ", ".join(other for other in group if other != trial_id)
        said = f"trained in one process with {others}" if others else f"trained alone: {reason}" if reason else None
        if said:
            ledger.update(trial_id, notes=(*ledger.records[trial_id].notes, said))
