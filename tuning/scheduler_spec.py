"""When a sweep stops a trial early."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from graftwork.config import Spec

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
        """All trials climb the same one."""
        return ((1.0, self.rungs(steps)),)


class HyperbandSpec(Spec):
    """Asynchronous Hyperband: several brackets of successive halving, each with a later first rung than the one before,
    for spaces where an early loss says little of the last (Li et al. 2018, arXiv 1603.06560), with Ray Tune's
    decisions."""

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
    """Why a scheduler can't do what it says with these steps and reports."""
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
