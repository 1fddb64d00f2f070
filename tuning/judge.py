"""Which trials go on: Ray Tune's schedulers, asked for each report, and told what an interrupted sweep had seen.

Tune's own STOP is not used: a Ray Train run nested in a trial that Tune stops keeps its workers (Ray 2.60), and a
process that trains several trials at once can't be stopped for one of them. The verdict goes back to the trial, which
leaves its loop.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from graftwork.tuning.records import TrialRecord
from graftwork.tuning.scheduler_spec import AshaSpec
from graftwork.tuning.spec import TuneSpec


class Judge(Protocol):
    """Decides after each report."""

    def goes_on(self, trial_id: str, step: int, loss: float) -> bool:
        """Whether a trial that reports `loss` at optimizer step `step` is to go on."""
        ...


def judge_of(spec: TuneSpec, past: Iterable[TrialRecord]) -> Judge:
    """The judge that a spec asks for; the losses of `past` trials count as if it had seen them."""
    judge = _Scheduled(_scheduler(spec)) if spec.scheduler is not None else _Lenient()
    seen = [(step, loss, record.trial_id) for record in past for step, loss in record.losses]
    for step, loss, trial_id in sorted(seen, key=lambda report: report[0]):
        judge.goes_on(trial_id, step, loss)
    return judge


class _Lenient:
    def goes_on(self, trial_id: str, step: int, loss: float) -> bool:
        return True


@dataclass(frozen=True)
class _StandIn:
    """What ASHA and the median rule (Ray 2.60) read of a trial."""

    trial_id: str


class _Scheduled:
    def __init__(self, scheduler: TrialScheduler) -> None:
        self._scheduler = scheduler
        self._known: set[str] = set()

    def goes_on(self, trial_id: str, step: int, loss: float) -> bool:
        trial = _StandIn(trial_id)
        if trial_id not in self._known:
            self._known.add(trial_id)
            self._scheduler.on_trial_add(None, trial)
        verdict = self._scheduler.on_trial_result(None, trial, {"step": step, "eval_loss": loss})
        return bool(verdict == TrialScheduler.CONTINUE)


def _scheduler(spec: TuneSpec) -> TrialScheduler:
    asked = spec.scheduler
    if isinstance(asked, AshaSpec):
        return ASHAScheduler(
            time_attr="step",
            metric="eval_loss",
            mode="min",
            max_t=spec.steps,
            grace_period=asked.grace_steps,
            reduction_factor=asked.reduction,
        )
    assert asked is not None
    return MedianStoppingRule(
        time_attr="step",
        metric="eval_loss",
        mode="min",
        grace_period=asked.grace_steps,
        min_samples_required=asked.min_trials,
        min_time_slice=math.inf,  # it would pause trials for others, through Tune's controller
        hard_stop=True,
    )
