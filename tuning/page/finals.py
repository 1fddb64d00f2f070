"""The finals as the page shows them."""

from collections.abc import Sequence

from graftwork.report.sweep_records import FinalistRecord, FinalsRecord
from graftwork.tuning.choice import gathered
from graftwork.tuning.finals import finalists
from graftwork.tuning.page.values import to_plain
from graftwork.tuning.records import SearchDecision, TrialRecord
from graftwork.tuning.spec import TuneSpec


def finals_record(spec: TuneSpec, trials: Sequence[TrialRecord], choice: SearchDecision) -> FinalsRecord | None:
    """None where no finals were held."""
    taking_part = finalists(spec, trials)
    if spec.finals is None or not taking_part or not choice.contrasts:
        return None
    behind = {one.other_id: one for one in choice.contrasts}
    found = []
    for finalist in gathered(spec, taking_part, trials):
        trial = finalist.trial
        if trial.trial_id not in behind and trial.trial_id != choice.best_id:
            continue  # a run of it is missing: `choice.notes` names it
        against = behind.get(trial.trial_id)
        found.append(FinalistRecord(
            id=trial.trial_id, values={key: to_plain(value) for key, value in trial.values.items()},
            losses=finalist.losses, mean=finalist.loss, difference=against.difference if against else None,
            low=against.low if against else None, high=against.high if against else None,
            p_adjusted=against.p_value if against else None,
            beaten=against is not None and against.beaten,
        ))  # fmt: skip
    ordered = sorted(found, key=lambda one: one.mean)
    return FinalsRecord(alpha=spec.finals.alpha, verdict=choice.verdict, finalists=tuple(ordered), notes=choice.notes)
