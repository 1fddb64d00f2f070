"""The learning-rate schedule of a run: its scheduler and warm-up, and the factors that the spec gives for parts."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.training.spec import OptimSpec


def scheduler_arguments(optim: "OptimSpec", steps: int) -> tuple[str, int]:
    """Return transformers' name of the scheduler (`lr_scheduler_type`) and its warm-up steps for a run of `steps`."""
    name = {"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule)
    return name, math.ceil(optim.warmup_ratio * steps)


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
