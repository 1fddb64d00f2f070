"""When a sweep stops a trial early."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from graftwork.adapters.spec import AdapterSpec
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


# How a sweep chooses the points of its space.


class GridSpec(Spec):
    """Every combination of the listed values, in order."""

    kind: Literal["grid"] = "grid"


class RandomSpec(Spec):
    """Points drawn at random, without repeats."""

    kind: Literal["random"] = "random"


class TpeSpec(Spec):
    """Tree-structured Parzen estimator (Bergstra 2011; arXiv 2304.11127) by Optuna."""

    kind: Literal["tpe"] = "tpe"
    n_startup: int = Field(default=4, ge=1)
    """First points, drawn at random by the seed: those of `kind: random`."""
    multivariate: bool = False
    """false: each key by itself, so that what any trial tells of the learning rate holds for all ranks: LoRA's best
    rate hardly moves with the rank. true: all keys together, for keys whose best values depend on each other."""


class GpSpec(Spec):
    """Bayesian optimisation with a Gaussian process by Optuna, log expected improvement (arXiv 2310.20708)."""

    kind: Literal["gp"] = "gp"
    n_startup: int = Field(default=4, ge=1)
    """First points, drawn at random by the seed: those of `kind: random`."""


class BohbSpec(Spec):
    """BOHB's search (Falkner et al. 2018, arXiv 1807.01774): all keys together, on the losses at the furthest step that
    enough trials reached. Goes with `scheduler: {kind: hyperband}`."""

    kind: Literal["bohb"] = "bohb"
    random_share: float = Field(default=1 / 3, ge=0, lt=1)
    """Points that are drawn at random all the same, so that a misleading early step can't lock the search."""


class PbtSpec(Spec):
    """Population based training of the learning rate's schedule (Jaderberg et al. 2017, arXiv 1711.09846)."""

    kind: Literal["pbt"] = "pbt"
    population: int = Field(default=4, ge=2)
    """Members, each at its own point of the space; `num_trials` is not read."""
    every: int = Field(ge=1)
    """Optimizer steps of a segment, after which the worst members go on from the best."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the members that is replaced, at least one."""
    factors: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.8, 1.25)
    """A replaced member's learning rate is multiplied by one of these."""

    @model_validator(mode="after")
    def _factors_change(self) -> Self:
        if 1.0 in self.factors or len(set(self.factors)) < len(self.factors):
            raise ValueError(f"factors must differ, from 1 too, found {list(self.factors)}")
        return self

    def refusal(self, steps: int, report_every: int) -> str | None:
        """Why it can't run in trials of so many steps."""
        if self.every >= steps or steps % self.every:
            return f"search.every={self.every} must divide steps={steps} into at least two segments"
        if self.every % report_every:
            return (
                f"search.every={self.every} must be a multiple of report_every={report_every}, so that members compare"
            )
        return None


SearchSpec = Annotated[GridSpec | RandomSpec | TpeSpec | GpSpec | BohbSpec | PbtSpec, Field(discriminator="kind")]


# The values that a sweep tries for one key of the training spec.


class CategoricalSpace(Spec):
    """One of the listed values, which may be whole parts of the spec: `adapter: {kind: choice, values: [{kind: lora,
    rank: 8}, {kind: ia3}]}`."""

    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[JsonValue, ...], Field(min_length=1)]

    def listed(self) -> Sequence[JsonValue]:
        """All values in order."""
        return self.values

    def samples(self) -> Sequence[JsonValue]:
        """Values that all must be allowed."""
        return self.values

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if any(value in self.values[:index] for index, value in enumerate(self.values)):
            raise ValueError(f"values must differ, found {list(self.values)}")
        return self


class _Range(Spec):
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be less than high={self.high:g}")
        return self

    def listed(self) -> None:
        """Too many."""

    def samples(self) -> Sequence[float]:
        """Both ends and a fraction between them, which an integer key refuses."""
        return self.low, self.high, self.low + 0.381966 * (self.high - self.low)


class Uniform(_Range):
    """A float between `low` and `high`, evenly."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(_Range):
    """A float between `low` and `high`, evenly on the log scale."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0, allow_inf_nan=False)


class _Integers(Spec):
    low: int
    high: int

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}")
        return self

    def samples(self) -> Sequence[int]:
        """Both ends."""
        return self.low, self.high


class IntRange(_Integers):
    """A whole number from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    log: bool = False
    """Evenly on the log scale."""

    @model_validator(mode="after")
    def _has_a_logarithm(self) -> Self:
        if self.log and self.low < 1:
            raise ValueError(f"low={self.low} has no place on a log scale: with log, low is 1 or more")
        return self

    def listed(self) -> Sequence[int]:
        """All values in order."""
        return range(self.low, self.high + 1)


class PowerOfTwo(_Integers):
    """A power of two from `low` to `high`, both included: 4, 8, 16, ..."""

    kind: Literal["power_of_two"] = "power_of_two"

    @model_validator(mode="after")
    def _are_powers(self) -> Self:
        for end in (self.low, self.high):
            if end < 1 or end & (end - 1):
                near = 2 ** max(0, end.bit_length() - 1) if end > 0 else 1
                raise ValueError(f"{end} is no power of two; {near} is one, and {2 * near}")
        return self

    def listed(self) -> Sequence[int]:
        """All values in order."""
        return [2**power for power in range(self.low.bit_length() - 1, self.high.bit_length())]


Domain = Annotated[CategoricalSpace | Uniform | LogUniform | IntRange | PowerOfTwo, Field(discriminator="kind")]
Space = dict[str, Domain]
"""By dotted key of the training spec."""


# What a sweep tries where its spec names no space: the learning rate, and of a LoRA the rank.


RANKS = (2, 64)
"""Capacity goes with the rank, so powers of two; a few thousand rows fit into 64 (the same source)."""


def default_space(adapter: AdapterSpec) -> Space:
    """For the adapter that is trained."""
    low, high = adapter.learning_rates
    space: Space = {"optim.lr": LogUniform(low=low, high=high)}
    if adapter.has_rank:
        space["adapter.rank"] = PowerOfTwo(low=RANKS[0], high=RANKS[1])
    return space
