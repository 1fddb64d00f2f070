"""Ray Tune's ASHA, told what an interrupted sweep had already seen."""

from collections.abc import Iterable
from types import SimpleNamespace

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from graftwork.tuning.records import TrialRecord
from graftwork.tuning.spec import TuneSpec


def scheduler(spec: TuneSpec, done: Iterable[TrialRecord]) -> TrialScheduler:
    """ASHA on held-out loss by optimizer step, or none. The losses of `done` trials fill the rungs first.

    Ray offers no way to add past trials to a scheduler but its own calls per trial and result; ASHA (Ray 2.60) reads
    nothing of the trial but its id there.
    """
    if spec.scheduler is None:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr="step",
        metric="eval_loss",
        mode="min",
        max_t=spec.steps,
        grace_period=spec.scheduler.grace_steps,
        reduction_factor=spec.scheduler.reduction,
    )
    seen = [(step, loss, record.trial_id) for record in done for step, loss in record.losses]
    for trial_id in {trial_id for _, _, trial_id in seen}:
        asha.on_trial_add(None, SimpleNamespace(trial_id=trial_id))
    for step, loss, trial_id in sorted(seen, key=lambda past: past[0]):
        asha.on_trial_result(None, SimpleNamespace(trial_id=trial_id), {"step": step, "eval_loss": loss})
    return asha
