"""Remaining time and cost of a sweep, predicted from its own pace."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from graftwork.tuning.trials import TrialRecord, TuneProgress

LEAST_ENDED = 3
"""Trials that must have ended before their steps say what the others will take."""


@dataclass(frozen=True)
class Pace:
    """What is left, at the pace so far."""

    left_s: float | None
    """None before the first report."""
    low_s: float | None = None
    high_s: float | None = None
    """Two standard errors of the mean steps of a trial; None where `left_s` takes every trial to its last step."""
    ended: int = 0
    """Trials behind the expected steps of the others."""
    device_s: float = 0.0
    """Of all trials so far: core seconds, of GPUs where trials have some."""
    device_total_s: float | None = None


def pace(progress: TuneProgress) -> Pace:
    """Steps that are left over steps taken a second, starts of processes included.

    A trial that is to come takes as many steps as those that ended took on average, early stops included; before three
    have ended every step is counted, so that the time is one at most.
    """
    own = _own_steps(progress)
    taken = sum(own.values())
    each = progress.gpus or progress.cpus
    device_s = each * sum(took_s(trial, progress.elapsed_s) for trial in progress.trials)
    ended = [own[trial.trial_id] for trial in progress.trials if trial.ended]
    if not taken or not progress.elapsed_s:
        return Pace(None, ended=len(ended), device_s=device_s)
    known = len(ended) >= LEAST_ENDED
    expected = fmean(ended) if known else float(progress.steps)
    error = stdev(ended) / math.sqrt(len(ended)) if known else 0.0

    def left_s(steps: float) -> float:
        return _left(progress, own, steps) * progress.elapsed_s / taken

    left = left_s(expected)
    low, high = (left_s(max(expected - 2 * error, 0.0)), left_s(min(expected + 2 * error, progress.steps)))
    total = device_s * (1 + _left(progress, own, expected) / taken)
    return Pace(left, low if known else None, high if known else None, len(ended), device_s, total)


def took_s(trial: TrialRecord, now_s: float) -> float:
    """Seconds of a trial on the sweep's clock: `wall_s` of one that runs is that of its last report."""
    return max(now_s - trial.started_s, 0.0) if trial.state == "running" and trial.started_s else trial.wall_s


def _own_steps(progress: TuneProgress) -> dict[str, int]:
    """Steps that each trial took itself: one that began from another's checkpoint counts from there."""
    steps = {trial.trial_id: trial.steps for trial in progress.trials}
    begun = {trial.trial_id: steps.get(trial.parent, 0) if trial.parent else 0 for trial in progress.trials}
    return {trial_id: max(reached - begun[trial_id], 0) for trial_id, reached in steps.items()}


def _left(progress: TuneProgress, own: Mapping[str, int], expected: float) -> float:
    """Steps that are still to be taken, when a trial takes so many; of the last ones with the others' places idle."""
    running = [max(expected - own[trial.trial_id], 0.0) for trial in progress.trials if trial.state == "running"]
    begun = sum(trial.state != "pending" for trial in progress.trials)
    to_come = max(progress.total - begun, 0)
    longest = expected if to_come else max(running, default=0.0)
    return max(sum(running) + to_come * expected, longest * min(progress.at_once, max(begun, 1)))
