"""The learning rate over the steps of a run: the schedule of the spec times the factors that it gives for parts."""

from collections.abc import Sequence
from typing import Any

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
