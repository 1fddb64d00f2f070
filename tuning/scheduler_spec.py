"""When a sweep stops a trial early."""

from typing import Annotated, Literal

from pydantic import Field

from graftwork.config import Spec


class AshaSpec(Spec):
    """Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934) by Ray Tune."""

    kind: Literal["asha"] = "asha"
    grace_steps: int = Field(default=4, ge=1)
    """No trial is stopped before this many optimizer steps."""
    reduction: int = Field(default=3, ge=2)
    """One of this many trials goes on at each rung."""

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Steps at which a trial may be stopped: grace, grace·reduction, ... below `steps`."""
        found = []
        rung = self.grace_steps
        while rung < steps:
            found.append(rung)
            rung *= self.reduction
        return tuple(found)


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


SchedulerSpec = Annotated[AshaSpec | MedianSpec, Field(discriminator="kind")]
