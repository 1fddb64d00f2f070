"""Trials by a sweep's objectives: the value of each, and those that no other trial beats in all of them."""

from collections.abc import Sequence

from graftwork.tuning.goal_spec import EVAL_LOSS, Goal
from graftwork.tuning.records import TrialRecord


def value_of(record: TrialRecord, goal: Goal) -> float | None:
    """Return the last reported value of an objective, in the metric's own unit; None where none was reported."""
    if not record.losses:
        return None
    if goal.metric == EVAL_LOSS:
        return record.losses[-1][1]
    if goal.metric in ("wall_s", "peak_rss_bytes"):
        return float(getattr(record, goal.metric))
    return record.metrics.get(goal.metric)


def pareto(records: Sequence[TrialRecord], objectives: Sequence[Goal]) -> tuple[TrialRecord, ...]:
    """Return the Pareto front: trials that ran to their end and that no other trial dominates.

    In the order of `records`. Repeats of finalists, and trials that lack a value, take no part.
    """
    rated = [
        (record, tuple(_cost(value, goal) for value, goal in zip(values, objectives, strict=True)))
        for record in records
        if record.state == "finished" and record.repeat_of is None
        for values in [[value_of(record, goal) for goal in objectives]]
        if None not in values
    ]
    return tuple(record for record, mine in rated if not any(_dominates(other, mine) for _, other in rated))


def _cost(value: float | None, goal: Goal) -> float:
    assert value is not None
    return value if goal.direction == "min" else -value


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
