"""Early stopping of trials: the specs of `scheduler`, and the rule of each, applied at every report.

A sweep that resumes applies the rules again to the reports of earlier attempts. Tune's own STOP is not used: a Ray
Train run nested in a trial that Tune stops keeps its workers (Ray 2.60), and a process that trains several trials at
once can't be stopped for one of them. The decision goes back to the trial, which leaves its loop.
"""

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from graftwork.config import Spec

if TYPE_CHECKING:
    from graftwork.tuning.spec import TuneSpec  # which has a field for these rules
    from graftwork.tuning.trials import TrialRecord


Ladder = tuple[float, tuple[int, ...]]
"""A share of the trials, and the steps at which one of them may be stopped."""


class AshaSpec(Spec):
    """Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934), with Ray Tune's decisions."""

    kind: Literal["asha"] = "asha"
    grace_steps: int = Field(default=4, ge=1)
    """No trial is stopped before this many optimizer steps; a multiple of `report_every`.
    Not given: `steps` / `reduction`², so that there are two rungs, to the nearest report."""
    reduction: int = Field(default=3, ge=2)
    """One of this many trials goes on at each rung."""

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Steps at which a trial may be stopped: grace, grace·reduction, ... below `steps`."""
        return _rungs(self.grace_steps, self.reduction, steps)

    def ladders(self, steps: int) -> tuple[Ladder, ...]:
        """One ladder for all trials."""
        return ((1.0, self.rungs(steps)),)


class HyperbandSpec(Spec):
    """Asynchronous Hyperband (Li et al. 2018, arXiv 1603.06560) with Ray Tune's decisions: brackets of successive
    halving, each with a later first rung than the one before, for spaces where an early loss predicts little."""

    kind: Literal["hyperband"] = "hyperband"
    grace_steps: int = Field(default=4, ge=1)
    """First rung of the first bracket; a multiple of `report_every`. Not given: as for `asha`."""
    reduction: int = Field(default=3, ge=2)
    """One of this many trials goes on at each rung."""
    brackets: int = Field(default=2, ge=2)
    """The first rung of bracket n is grace·reduction^(n-1). A trial's bracket is drawn by `seed` and the trial:
    a bracket with one rung more has e times the trials."""

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Those of the first bracket, which has all."""
        return _rungs(self.grace_steps, self.reduction, steps)

    def ladders(self, steps: int) -> tuple[Ladder, ...]:
        """One a bracket."""
        rungs = self.rungs(steps)
        weights = [math.exp(-number) for number in range(self.brackets)]
        return tuple((weight / sum(weights), rungs[number:]) for number, weight in enumerate(weights))


class MedianSpec(Spec):
    """Stop a trial whose best loss is worse than the median of the others' running averages (Vizier, Golovin 2017)."""

    kind: Literal["median"] = "median"
    grace_steps: int = Field(default=4, ge=1)
    """No trial is stopped before this many optimizer steps."""
    min_trials: int = Field(default=3, ge=1)
    """Trials that must have reported before one can be stopped."""

    @property
    def reduction(self) -> int:
        """One of this many trials goes on, for the plan."""
        return 2

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Where half of the trials may be stopped, for the plan."""
        return (self.grace_steps,) if self.grace_steps < steps else ()

    def ladders(self, steps: int) -> tuple[Ladder, ...]:
        """For the plan."""
        return ((1.0, self.rungs(steps)),)


SchedulerSpec = Annotated[AshaSpec | HyperbandSpec | MedianSpec, Field(discriminator="kind")]


def with_grace(tree: Any, steps: int, report_every: int) -> Any:
    """The tree of a sweep's spec; where it leaves the rungs to us, `scheduler.grace_steps` is set."""
    given = tree.get("scheduler", {"kind": "asha"}) if isinstance(tree, Mapping) else None
    if not isinstance(given, Mapping) or given.get("kind") not in ("asha", "hyperband") or "grace_steps" in given:
        return tree
    every, whole, reduction = (
        tree.get("report_every", report_every),
        tree.get("steps", steps),
        given.get("reduction", 3),
    )
    if not all(isinstance(number, int) and number > 0 for number in (every, whole, reduction)):
        return tree  # each is refused with its own reason
    return {**tree, "scheduler": {**given, "grace_steps": every * max(1, round(whole / reduction**2 / every))}}


def refusal(scheduler: AshaSpec | HyperbandSpec | MedianSpec, steps: int, report_every: int) -> str | None:
    """Return why a scheduler cannot work with these steps and reports; None where it can."""
    grace = scheduler.grace_steps
    if grace >= steps:
        return (
            f"scheduler.grace_steps={grace} must be less than steps={steps}, "
            "or no trial could be stopped; `scheduler: null` runs every trial to its end"
        )
    if isinstance(scheduler, MedianSpec):
        return None
    if grace % report_every:
        later = report_every * math.ceil(grace / report_every)
        return (
            f"scheduler.grace_steps={grace} is no multiple of report_every={report_every}: a trial is judged at its "
            f"reports, so rung {grace} would be judged at step {later}. Set grace_steps={later}"
        )
    if isinstance(scheduler, HyperbandSpec) and scheduler.brackets > len(scheduler.rungs(steps)) + 1:
        rungs = scheduler.rungs(steps)
        return (
            f"scheduler.brackets={scheduler.brackets} is more than the rungs give: with rungs {list(rungs)} below "
            f"steps={steps}, bracket {len(rungs) + 1} stops no trial and a further one would be the same. "
            f"Set brackets={len(rungs) + 1}, or smaller grace_steps"
        )
    return None


def _rungs(grace: int, reduction: int, steps: int) -> tuple[int, ...]:
    found = []
    rung = grace
    while rung < steps:
        found.append(rung)
        rung *= reduction
    return tuple(found)


class StoppingRule(Protocol):
    """Decides after each report."""

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        """Return why a trial that reports `loss` at optimizer step `step` must stop; None where it continues."""
        ...


def stopping_rule(spec: "TuneSpec", past: "Iterable[TrialRecord]") -> StoppingRule:
    """Return the rule of a spec; the losses of `past` trials count as if the rule had seen them."""
    rule: StoppingRule
    if spec.scheduler is None:
        rule = _OnlyDiverged()
    else:
        rule = _Median(spec.scheduler) if isinstance(spec.scheduler, MedianSpec) else _Halving(spec, spec.scheduler)
    seen = [(step, loss, record.trial_id) for record in past for step, loss in record.losses]
    for step, loss, trial_id in sorted(seen, key=lambda report: report[0]):
        rule.reason_to_stop(trial_id, step, loss)
    return rule


class _OnlyDiverged:
    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        return _divergence_reason(step, loss)


class _Halving:
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), in several brackets for Hyperband.

    Decides as Ray Tune's AsyncHyperBandScheduler does (tests/unit/tuning/test_early_stopping.py compares the
    two). Ray's neither shows its cut-offs nor runs outside of a Tune run, except through private fields.
    """

    def __init__(self, spec: "TuneSpec", asked: AshaSpec | HyperbandSpec) -> None:
        self._steps, self._seed, self._reduction = spec.steps, spec.seed, asked.reduction
        count = asked.brackets if isinstance(asked, HyperbandSpec) else 1
        most = np.log(spec.steps / asked.grace_steps) / np.log(asked.reduction) + 1
        self._brackets: list[list[tuple[int, dict[str, float]]]] = [
            [(asked.grace_steps * asked.reduction**place, {}) for place in reversed(range(skipped, int(most)))]
            for skipped in range(count)
        ]
        """Of each bracket (optimizer step, loss of each trial there), the last rung first."""
        self._bracket_of: dict[str, int] = {}

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        """A loss that is not finite is no part of a rung's cut-off; at the last step there is nothing to stop."""
        if not math.isfinite(loss) or step >= self._steps:
            return _divergence_reason(step, loss)
        if trial_id not in self._bracket_of:
            self._bracket_of[trial_id] = self._draw_bracket(trial_id)
        number = self._bracket_of[trial_id]
        for rung, losses in self._brackets[number]:
            if step >= rung and trial_id not in losses:
                earlier = [-other for other in losses.values()]
                losses[trial_id] = loss
                cut_off = -np.percentile(earlier, (1 - 1 / self._reduction) * 100) if earlier else math.inf
                return None if loss <= cut_off else self._explain(step, loss, cut_off, number, rung, len(earlier))
        return None

    def _draw_bracket(self, trial_id: str) -> int:
        """Draw from seed and id alone, so that a resumed sweep draws the same; a rung more is e times as likely."""
        rungs = np.array([len(bracket) for bracket in self._brackets])
        weights = np.e ** (rungs - rungs.max())
        chance = np.random.RandomState(zlib.crc32(f"{self._seed} {trial_id}".encode()))
        return int(chance.choice(len(rungs), p=weights / weights.sum()))

    def _explain(self, step: int, loss: float, cut_off: float, number: int, rung: int, earlier: int) -> str:
        of = f"bracket {number + 1}, " if len(self._brackets) > 1 else ""
        trials = f"{earlier} earlier trial{'s' if earlier > 1 else ''}"
        share = f"the best 1 of {self._reduction} go on"
        at = f"the cut-off {cut_off:.4f} of {of}rung {rung} ({trials}; {share})"
        return f"stopped at step {step}: loss {loss:.4f} is above {at}"


class _Median:
    """Median stopping (Golovin et al., Google Vizier, 2017): stops a trial whose best loss is above the median of the
    running averages of the others. Decides as Ray Tune's MedianStoppingRule does."""

    def __init__(self, asked: MedianSpec) -> None:
        self._grace_steps, self._min_trials = asked.grace_steps, asked.min_trials
        self._seen: dict[str, list[tuple[int, float]]] = {}

    def reason_to_stop(self, trial_id: str, step: int, loss: float) -> str | None:
        if not math.isfinite(loss):
            return _divergence_reason(step, loss)
        self._seen.setdefault(trial_id, []).append((step, loss))
        if step < self._grace_steps:
            return None
        others = [seen for other, seen in self._seen.items() if other != trial_id and seen[-1][0] >= step]
        losses = [[loss for at, loss in seen if self._grace_steps <= at <= step] for seen in others]
        averages = [float(np.mean(counted)) for counted in losses if counted]
        if len(averages) < self._min_trials:
            return None
        best, median = min(loss for _, loss in self._seen[trial_id]), float(np.median(averages))
        if best <= median:
            return None
        return (
            f"stopped at step {step}: best loss {best:.4f} is above {median:.4f}, the median of the running "
            f"averages of {len(averages)} trials"
        )


def _divergence_reason(step: int, loss: float) -> str | None:
    return None if math.isfinite(loss) else f"stopped at step {step}: its held-out loss is {loss}"
