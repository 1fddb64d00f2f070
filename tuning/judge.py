"""Which trials go on: Ray Tune's schedulers, asked for each report, and told what an interrupted sweep had seen.

Tune's own STOP is not used: a Ray Train run nested in a trial that Tune stops keeps its workers (Ray 2.60), and a
process that trains several trials at once can't be stopped for one of them. The verdict goes back to the trial, which
leaves its loop.
"""

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from graftwork.tuning.records import TrialRecord
from graftwork.tuning.scheduler_spec import AshaSpec, HyperbandSpec, MedianSpec
from graftwork.tuning.spec import TuneSpec


class Judge(Protocol):
    """Decides after each report."""

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        """Why a trial that reports `loss` at optimizer step `step` is to stop, in words; None: it goes on."""
        ...


def judge_of(spec: TuneSpec, past: Iterable[TrialRecord]) -> Judge:
    """The judge that a spec asks for; the losses of `past` trials count as if it had seen them."""
    judge = _judge(spec)
    seen = [(step, loss, record.trial_id) for record in past for step, loss in record.losses]
    for step, loss, trial_id in sorted(seen, key=lambda report: report[0]):
        judge.reason_to_stop(trial_id, step, loss)
    return judge


def _judge(spec: TuneSpec) -> Judge:
    if spec.scheduler is None:
        return _Lenient()
    return _Median(spec.scheduler) if isinstance(spec.scheduler, MedianSpec) else _Halving(spec, spec.scheduler)


class _Lenient:
    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        return _not_finite(step, loss)


@dataclass(frozen=True)
class _StandIn:
    """What Ray's schedulers (2.60) read of a trial."""

    trial_id: str


class _Halving:
    def __init__(self, spec: TuneSpec, asked: AshaSpec | HyperbandSpec) -> None:
        self._steps, self._seed, self._reduction = spec.steps, spec.seed, asked.reduction
        self._scheduler = AsyncHyperBandScheduler(
            time_attr="step",
            metric="eval_loss",
            mode="min",
            max_t=spec.steps,
            grace_period=asked.grace_steps,
            reduction_factor=asked.reduction,
            brackets=asked.brackets if isinstance(asked, HyperbandSpec) else 1,
        )
        self._known: set[str] = set()

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        """A loss that is not finite is no part of a rung's cut-off; at the last step there is nothing to stop."""
        if not math.isfinite(loss) or step >= self._steps:
            return _not_finite(step, loss)
        if trial_id not in self._known:
            self._known.add(trial_id)
            with _drawn_by(f"{self._seed} {trial_id}"):
                self._scheduler.on_trial_add(None, _StandIn(trial_id))
        cut_off = self._cut_off(trial_id, step)
        verdict = self._scheduler.on_trial_result(None, _StandIn(trial_id), {"step": step, "eval_loss": loss})
        if verdict == TrialScheduler.CONTINUE:
            return None
        assert cut_off is not None, "Ray stops at a rung alone"
        return f"stopped at step {step}: loss {loss:.4f} is above {cut_off}"

    def _cut_off(self, trial_id: str, step: int) -> str | None:
        """What Ray is about to compare with, in words. Ray keeps rewards: losses with the sign turned."""
        bracket = self._scheduler._trial_info[trial_id]
        for rung, rewards in bracket._rungs:
            if step >= rung and trial_id not in rewards:
                if not rewards:
                    return None
                of = f"bracket {self._scheduler._brackets.index(bracket) + 1}, " if self._brackets > 1 else ""
                trials = f"{len(rewards)} earlier trial{'s' if len(rewards) > 1 else ''}"
                share = f"the best 1 of {self._reduction} go on"
                return f"the cut-off {-bracket.cutoff(rewards):.4f} of {of}rung {rung} ({trials}; {share})"
        return None

    @property
    def _brackets(self) -> int:
        return len(self._scheduler._brackets)


class _Median:
    def __init__(self, asked: MedianSpec) -> None:
        self._asked = asked
        self._rule = MedianStoppingRule(
            time_attr="step",
            metric="eval_loss",
            mode="min",
            grace_period=asked.grace_steps,
            min_samples_required=asked.min_trials,
            min_time_slice=math.inf,  # it would pause trials for others, through Tune's controller
            hard_stop=True,
        )

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        if not math.isfinite(loss):
            return _not_finite(step, loss)
        trial = _StandIn(trial_id)
        if self._rule.on_trial_result(None, trial, {"step": step, "eval_loss": loss}) == TrialScheduler.CONTINUE:
            return None
        self._rule._stopped_trials.discard(trial)  # told again of a past trial, in another order, Ray would assert
        others = [self._rule._running_mean(other, step) for other in self._rule._trials_beyond_time(step)
                  if other != trial]  # fmt: skip
        best = self._rule._best_result(trial)
        return (
            f"stopped at step {step}: best loss {best:.4f} is above {np.median(others):.4f}, the median of the running "
            f"averages of {len(others)} trials"
        )


def _not_finite(step: int, loss: float) -> str | None:
    return None if math.isfinite(loss) else f"stopped at step {step}: its held-out loss is {loss}"


@contextmanager
def _drawn_by(what: str) -> Iterator[None]:
    """Ray draws a trial's bracket from numpy's global generator: for the block it follows from `what` alone, so that a
    sweep that goes on draws the same."""
    before = np.random.get_state()
    np.random.seed(zlib.crc32(what.encode()))
    try:
        yield
    finally:
        np.random.set_state(before)
