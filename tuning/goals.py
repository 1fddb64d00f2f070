"""Trials by a sweep's goals: the value of each, and those that no other trial beats in all of them."""

from collections.abc import Sequence

from graftwork.tuning.goal_spec import EVAL_LOSS, Goal
from graftwork.tuning.records import TrialRecord


def value_of(record: TrialRecord, goal: Goal) -> float | None:
    """What a trial's last report says of a goal, in the metric's own unit; None where it has not reported it."""
    if not record.losses:
        return None
    if goal.metric == EVAL_LOSS:
        return record.losses[-1][1]
    if goal.metric in ("wall_s", "peak_rss_bytes"):
        return float(getattr(record, goal.metric))
    return record.metrics.get(goal.metric)


def pareto(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> tuple[TrialRecord, ...]:
    """Of the trials that ran to their end, those that no other is at least as good as in all goals and better in one.

    In the order of `records`. Repeats of finalists, and trials that lack a value, take no part.
    """
    rated = [
        (record, tuple(_cost(value, goal) for value, goal in zip(values, goals, strict=True)))
        for record in records
        if record.state == "finished" and record.repeat_of is None
        for values in [[value_of(record, goal) for goal in goals]]
        if None not in values
    ]
    return tuple(record for record, mine in rated if not any(_dominates(other, mine) for _, other in rated))


def _cost(value: float | None, goal: Goal) -> float:
    assert value is not None
    return value if goal.direction == "min" else -value


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
