"""Hook into PyTorch: a schedule's present rates. Checked with torch 2.13."""

from collections.abc import Sequence
from typing import Any


def set_last_rates(scheduler: Any, rates: Sequence[float]) -> None:
    """Make a learning rate scheduler report these rates as its present ones (`get_last_lr`), until its next step.

    A schedule whose lambdas change after a resume reports the checkpoint's rate for the first step otherwise.
    Upstream: `torch.optim.lr_scheduler.LRScheduler._last_lr`.
    """
    scheduler._last_lr = list(rates)
