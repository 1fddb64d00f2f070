"""Of trials that are as good as each other, the one that costs least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from graftwork.tuning.goal_spec import Goal
from graftwork.tuning.goals import value_of
from graftwork.tuning.records import TrialRecord

COSTS = (Goal(metric="trained_parameters"), Goal(metric="step_s"))
"""What counts after the sweep's own objectives."""
MEASURED = ("step_s", "wall_s", "peak_rss_bytes")
SAME = 0.05
"""Measured costs that are no further apart than this share count as equal: seconds vary with the machine's load."""


@dataclass(frozen=True)
class Cheapest:
    """The trial, and what decided."""

    trial_id: str
    by: str | None
    """The metric; None where nothing tells them apart."""
    figures: str = ""
    """Its cost against the least of the others, e.g. `0.9 M against 3.7 M trained parameters`."""


def cheapest(objectives: Sequence[Goal], tied: Mapping[str, Sequence[TrialRecord]]) -> Cheapest:
    """Compare by the `objectives`, then trained parameters, then seconds a step; else return the first of `tied`.

    `tied`: the runs of each trial by its id; the mean over them counts.
    """
    found = Cheapest(next(iter(tied)), None)
    pool = list(tied)
    for goal in (*objectives, *COSTS):
        costs = {one: value for one in pool if (value := _mean(tied[one], goal)) is not None}
        if len(costs) < len(pool):
            continue
        best = min if goal.direction == "min" else max
        least = best(costs.values())
        pool = [one for one, cost in costs.items() if _same(cost, least, goal)]
        if len(pool) < len(costs):
            others = best(cost for one, cost in costs.items() if one not in pool)
            found = Cheapest(pool[0], goal.metric, _against(goal.metric, least, others))
    return found


def _same(a: float, b: float, goal: Goal) -> bool:
    return a == b or (goal.metric in MEASURED and abs(a - b) <= SAME * max(a, b))


def _mean(runs: Sequence[TrialRecord], goal: Goal) -> float | None:
    values = [value_of(run, goal) for run in runs]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _against(metric: str, a: float, b: float) -> str:
    if metric == "trained_parameters":
        return f"{_count(a)} against {_count(b)} trained parameters"
    if metric in ("adapter_bytes", "peak_rss_bytes"):
        return f"{a / 2**20:.1f} against {b / 2**20:.1f} MiB of {metric.removesuffix('_bytes')}"
    unit = {"step_s": " s a step", "wall_s": " s", "tokens": " tokens"}[metric]
    return f"{a:.3g} against {b:.3g}{unit}"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:.0f}"
