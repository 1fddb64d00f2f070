"""The finals as the page shows them."""

from collections.abc import Sequence
from statistics import fmean

from graftwork.report.sweep_records import FinalistRecord, FinalsRecord
from graftwork.tuning.finals import finalists
from graftwork.tuning.page.values import plain
from graftwork.tuning.records import Choice, TrialRecord
from graftwork.tuning.spec import TuneSpec


def finals_record(spec: TuneSpec, trials: Sequence[TrialRecord], choice: Choice) -> FinalsRecord | None:
    """None where no finals were held."""
    taking_part = finalists(spec, trials)
    if spec.finals is None or not taking_part or not choice.contrasts:
        return None
    behind = {one.other_id: one for one in choice.contrasts}
    found = []
    for trial in taking_part:
        if trial.trial_id not in behind and trial.trial_id != choice.best_id:
            continue  # a run of it is missing: `choice.notes` names it
        runs = [trial, *(one for one in trials if one.repeat_of == trial.trial_id and one.state == "finished")]
        losses = tuple(run.losses[-1][1] for run in runs)
        against = behind.get(trial.trial_id)
        found.append(FinalistRecord(
            id=trial.trial_id, values={key: plain(value) for key, value in trial.values.items()}, losses=losses,
            mean=fmean(losses), difference=against.difference if against else None,
            low=against.low if against else None, high=against.high if against else None,
            p_adjusted=against.p_value if against else None,
            beaten=against is not None and against.beaten,
        ))  # fmt: skip
    ordered = sorted(found, key=lambda one: one.mean)
    return FinalsRecord(alpha=spec.finals.alpha, verdict=choice.verdict, finalists=tuple(ordered), notes=choice.notes)
