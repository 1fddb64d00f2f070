"""Shares of failures with their intervals, and how many more questions would settle an open one."""

import math
from collections.abc import Mapping
from typing import Literal

from graftwork import stats
from graftwork.metrics import signature
from graftwork.report.records import Share

State = Literal["matters", "dismissed", "open"]
_MOST = 1_000_000


def share(name: str, count: int, n: int, alpha: float, recipe: Mapping[str, object]) -> Share:
    """`count` of at least one."""
    found = stats.wilson(count, n, alpha)
    signed = signature(name, n, {**recipe, "ci": "wilson", "alpha": f"{alpha:g}"})
    return Share(count=count, n=n, value=count / n, low=found.low, high=found.high, signature=signed)


def state(found: Share, limit: float) -> State:
    """Whether the share is shown to be at least the limit, or below it."""
    if found.low >= limit:
        return "matters"
    return "dismissed" if found.high < limit else "open"


def n_to_settle(value: float, limit: float, alpha: float) -> int | None:
    """Failures at which a share like this one lies wholly on one side of the limit. None: it is too near for that."""
    low, high = 1, 2
    while not _settled(value, high, limit, alpha):
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _settled(value, middle, limit, alpha) else (middle, high)
    return high


def _settled(value: float, n: int, limit: float, alpha: float) -> bool:
    found = stats.wilson(math.floor(value * n + 0.5), n, alpha)
    return found.low >= limit or found.high < limit
