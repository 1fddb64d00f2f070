"""Early stopping of trials: the rules are asked at each report, also for what an interrupted sweep had seen.

Tune's own STOP is not used: a Ray Train run nested in a trial that Tune stops keeps its workers (Ray 2.60), and a
process that trains several trials at once can't be stopped for one of them. The verdict goes back to the trial, which
leaves its loop.
"""

import math
import zlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from graftwork.tuning.search_space import AshaSpec, HyperbandSpec, MedianSpec
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TrialRecord


class StoppingRule(Protocol):
    """Decides after each report."""

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        """Why a trial that reports `loss` at optimizer step `step` is to stop, in words; None: it goes on."""
        ...


def judge_of(spec: TuneSpec, past: Iterable[TrialRecord]) -> StoppingRule:
    """The judge that a spec asks for; the losses of `past` trials count as if it had seen them."""
    judge = _judge(spec)
    seen = [(step, loss, record.trial_id) for record in past for step, loss in record.losses]
    for step, loss, trial_id in sorted(seen, key=lambda report: report[0]):
        judge.reason_to_stop(trial_id, step, loss)
    return judge


def _judge(spec: TuneSpec) -> StoppingRule:
    if spec.scheduler is None:
        return _Lenient()
    return _Median(spec.scheduler) if isinstance(spec.scheduler, MedianSpec) else _Halving(spec, spec.scheduler)


class _Lenient:
    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        return _not_finite(step, loss)


class _Halving:
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), in several brackets for Hyperband.

    Decides as Ray Tune's AsyncHyperBandScheduler does (tests/unit/tuning/test_early_stopping.py compares the
    two); owned because that one neither shows its cut-offs nor can be asked outside of a Tune run except through
    private fields.
    """

    def __init__(self, spec: TuneSpec, asked: AshaSpec | HyperbandSpec) -> None:
        self._steps, self._seed, self._reduction = spec.steps, spec.seed, asked.reduction
        count = asked.brackets if isinstance(asked, HyperbandSpec) else 1
        self._brackets = [_rungs(spec.steps, asked.grace_steps, asked.reduction, skipped) for skipped in range(count)]
        self._bracket_of: dict[str, int] = {}

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        """A loss that is not finite is no part of a rung's cut-off; at the last step there is nothing to stop."""
        if not math.isfinite(loss) or step >= self._steps:
            return _not_finite(step, loss)
        if trial_id not in self._bracket_of:
            self._bracket_of[trial_id] = self._drawn(trial_id)
        number = self._bracket_of[trial_id]
        for rung, losses in self._brackets[number]:
            if step >= rung and trial_id not in losses:
                earlier = [-other for other in losses.values()]
                losses[trial_id] = loss
                cut_off = -np.percentile(earlier, (1 - 1 / self._reduction) * 100) if earlier else math.inf
                return None if loss <= cut_off else self._words(step, loss, cut_off, number, rung, len(earlier))
        return None

    def _drawn(self, trial_id: str) -> int:
        """The bracket of a trial: one with a rung more is e times as likely. It follows from seed and id alone, so
        that a sweep that goes on draws the same."""
        rungs = np.array([len(bracket) for bracket in self._brackets])
        weights = np.e ** (rungs - rungs.max())
        chance = np.random.RandomState(zlib.crc32(f"{self._seed} {trial_id}".encode()))
        return int(chance.choice(len(rungs), p=weights / weights.sum()))

    def _words(self, step: int, loss: float, cut_off: float, number: int, rung: int, earlier: int) -> str:
        of = f"bracket {number + 1}, " if len(self._brackets) > 1 else ""
        trials = f"{earlier} earlier trial{'s' if earlier > 1 else ''}"
        share = f"the best 1 of {self._reduction} go on"
        at = f"the cut-off {cut_off:.4f} of {of}rung {rung} ({trials}; {share})"
        return f"stopped at step {step}: loss {loss:.4f} is above {at}"


def _rungs(steps: int, grace_steps: int, reduction: int, skipped: int) -> list[tuple[int, dict[str, float]]]:
    """(optimizer step, loss of each trial there) of a bracket, the last rung first. `skipped`: rungs left out early."""
    count = int(np.log(steps / grace_steps) / np.log(reduction) - skipped + 1)
    return [(grace_steps * reduction ** (place + skipped), {}) for place in reversed(range(count))]


class _Median:
    """Median stopping (Golovin et al., Google Vizier, 2017): a trial stops whose best loss is above the median of the
    running averages of the others. Decides as Ray Tune's MedianStoppingRule does, and is owned for the same reason."""

    def __init__(self, asked: MedianSpec) -> None:
        self._grace_steps, self._min_trials = asked.grace_steps, asked.min_trials
        self._seen: dict[str, list[tuple[int, float]]] = {}

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        if not math.isfinite(loss):
            return _not_finite(step, loss)
        self._seen.setdefault(trial_id, []).append((step, loss))
        if step < self._grace_steps:
            return None
        others = [seen for other, seen in self._seen.items() if other != trial_id and seen[-1][0] >= step]
        averages = [average for seen in others if (average := self._average(seen, step)) is not None]
        if len(averages) < self._min_trials:
            return None
        best, median = min(loss for _, loss in self._seen[trial_id]), float(np.median(averages))
        if best <= median:
            return None
        return (
            f"stopped at step {step}: best loss {best:.4f} is above {median:.4f}, the median of the running "
            f"averages of {len(averages)} trials"
        )

    def _average(self, seen: list[tuple[int, float]], until: int) -> float | None:
        """Mean of the losses from grace_steps to `until`; None without one."""
        losses = [loss for step, loss in seen if self._grace_steps <= step <= until]
        return float(np.mean(losses)) if losses else None


def _not_finite(step: int, loss: float) -> str | None:
    return None if math.isfinite(loss) else f"stopped at step {step}: its held-out loss is {loss}"
