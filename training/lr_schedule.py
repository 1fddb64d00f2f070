"""The learning-rate schedule of a run: its scheduler and warm-up, and the factors that the spec gives for parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from graftwork.training.spec import OptimSpec

Schedule = Literal["constant", "linear", "cosine", "cosine_with_min_lr", "wsd"]
MIN_LR_RATIO = {"cosine_with_min_lr": 0.1, "wsd": 0.0}
"""Schedules with a least rate, and the ratio where the spec gives none."""
DECAY_RATIO = 0.1
_NAMES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


@dataclass(frozen=True)
class SchedulerArguments:
    """Scheduler of a run, as transformers' `get_scheduler` takes it."""

    name: str
    """`lr_scheduler_type`."""
    warmup_steps: int
    kwargs: dict[str, float] = field(default_factory=dict)
    """`lr_scheduler_kwargs`."""


def scheduler_of(optim: "OptimSpec", steps: int) -> SchedulerArguments:
    """Return the scheduler of a run of `steps`. Warm-up and decay are rounded up to whole steps."""
    name, warmup = _NAMES.get(optim.schedule, optim.schedule), math.ceil(optim.warmup_ratio * steps)
    given = optim.min_lr_ratio
    least = MIN_LR_RATIO.get(optim.schedule, 0.0) if given is None else given
    if optim.schedule == "cosine_with_min_lr":
        return SchedulerArguments(name, warmup, {"min_lr_rate": least})
    if optim.schedule == "wsd":
        share = DECAY_RATIO if optim.decay_ratio is None else optim.decay_ratio
        decay = min(math.ceil(share * steps), steps - warmup)
        return SchedulerArguments(name, warmup, {"num_decay_steps": decay, "min_lr_ratio": least})
    return SchedulerArguments(name, warmup)


def check(optim: "OptimSpec") -> None:
    """Raise ValueError for keys that the schedule does not have, or that leave it no steps."""
    if optim.min_lr_ratio is not None and optim.schedule not in MIN_LR_RATIO:
        raise ValueError(
            f"optim.min_lr_ratio={optim.min_lr_ratio:g} can't take effect with optim.schedule={optim.schedule}: set "
            f"optim.schedule={' or '.join(MIN_LR_RATIO)}"
        )
    if optim.decay_ratio is not None and optim.schedule != "wsd":
        raise ValueError(
            f"optim.decay_ratio={optim.decay_ratio:g} can't take effect with optim.schedule={optim.schedule}: set "
            "optim.schedule=wsd"
        )
    if optim.schedule == "wsd" and optim.warmup_ratio + (optim.decay_ratio or DECAY_RATIO) > 1:
        raise ValueError(
            f"optim.warmup_ratio={optim.warmup_ratio:g} and optim.decay_ratio={optim.decay_ratio or DECAY_RATIO:g} are "
            "more than the whole run: warm-up, stable phase and decay follow each other"
        )


Factors = tuple[tuple[float, float], ...]
"""(share of the run's steps after which it holds, factor of the learning rate), shares rising."""


def factor_at(factors: Sequence[tuple[float, float]], done: int, steps: int) -> float:
    """The factor of the step after `done` of `steps`; 1 before the first share."""
    return next((factor for share, factor in reversed(factors) if done >= round(share * steps)), 1.0)


def scale(optimizer: Any, scheduler: Any, factors: Factors, steps: int) -> None:
    """Multiply what a torch LambdaLR gives, from its present step on. A checkpoint's state holds the rate that its own
    factors gave for the next step, so that rate is computed again. Before the first step of an attempt."""
    from graftwork.compat.hf import set_last_rates

    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    given = scheduler.lr_lambdas
    scheduler.lr_lambdas = [lambda done, one=one: one(done) * factor_at(factors, done, steps) for one in given]
    now = scheduler.last_epoch
    rates = [base * one(now) for base, one in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    set_last_rates(scheduler, rates)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
