"""Early stops: what they saved, and what they may have lost.

What a stopped trial would have come to was not measured. What can be said comes from the trials that ran to their end:
how far the order of the losses at a rung is that at the end, and how much of them caught up on the winner by as much as
the stopped trial lacked. They are the better ones at each rung, so a stopped trial may differ from them.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from scipy.stats import kendalltau

from graftwork.report.sweep_records import RungRecord, StoppedTrial, StopsRecord, SweepTrial

CLOSEST = 5


def stops(trials: Sequence[SweepTrial], best_id: str | None, steps: int) -> StopsRecord | None:
    """None where no trial was stopped."""
    stopped = [trial for trial in trials if trial.state == "stopped" and trial.losses]
    if not stopped:
        return None
    finished = [trial for trial in trials if trial.state == "finished"]
    best = next((trial for trial in finished if trial.id == best_id), None)
    saved = sum(steps - trial.last_step for trial in stopped)
    taken = sum(trial.last_step for trial in trials)
    lacked = sorted(_lacked(stopped, finished, best), key=lambda one: (-_share(one), one.gap)) if best else []
    most = [max(_caught_up(finished, best, one.step)) - one.gap for one in lacked if one.n] if best else []
    at_rungs = sorted(Counter(trial.last_step for trial in stopped).items())
    return StopsRecord(
        stopped=len(stopped), saved_steps=saved, all_steps=taken + saved, saved_s=_seconds(trials, saved),
        rungs=tuple(_rung(step, count, finished) for step, count in at_rungs),
        closest=tuple(lacked[:CLOSEST]), regret=max(0.0, *most) if most else None,
    )  # fmt: skip


def _seconds(trials: Sequence[SweepTrial], saved: int) -> float | None:
    """Saved steps at the trials' mean pace, their start included only as far as it was spread over their steps."""
    timed = [trial for trial in trials if trial.wall_s and trial.last_step]
    steps = sum(trial.last_step for trial in timed)
    return saved * sum(trial.wall_s or 0.0 for trial in timed) / steps if steps else None


def _rung(step: int, count: int, finished: Sequence[SweepTrial]) -> RungRecord:
    pairs = [(here, trial.losses[-1][1]) for trial in finished if (here := trial.loss_at(step)) is not None]
    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else math.nan
    couples = list(itertools.combinations(pairs, 2))
    return RungRecord(step=step, stopped=count, finished=len(pairs), tau=None if math.isnan(tau) else tau,
                      reversed_pairs=sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in couples),
                      pairs=len(couples))  # fmt: skip


def _lacked(stopped: Sequence[SweepTrial], finished: Sequence[SweepTrial], best: SweepTrial) -> Sequence[StoppedTrial]:
    found = []
    for trial in stopped:
        there = best.loss_at(trial.last_step)
        if there is None:
            continue
        gap = trial.losses[-1][1] - there
        caught = _caught_up(finished, best, trial.last_step)
        found.append(StoppedTrial(id=trial.id, step=trial.last_step, gap=gap, n=len(caught),
                                  caught_up=sum(by >= gap for by in caught)))  # fmt: skip
    return found


def _caught_up(finished: Sequence[SweepTrial], best: SweepTrial, step: int) -> list[float]:
    """By how much each other finished trial came nearer to the winner between a step and the end."""
    there = best.loss_at(step)
    assert there is not None
    return [(here - there) - (trial.losses[-1][1] - best.losses[-1][1]) for trial in finished
            if trial is not best and (here := trial.loss_at(step)) is not None]  # fmt: skip


def _share(one: StoppedTrial) -> float:
    return one.caught_up / one.n if one.n else 0.0
