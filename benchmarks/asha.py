"""What early stopping saves, and whether it still finds the winner: ASHA on recorded curves against the whole grid.

    python -m benchmarks.asha

The grid's trials (rank x learning rate, 20 and 15 points, SmolLM2-135M, 16 steps; two tasks, three seeds of data and
start) were run to their ends once (benchmarks/sweep_curves.py). Here two processes take them in a shuffled order, a
step of any trial taking one unit of time, and the sweep's own judge says after each report who goes on. Compute is
steps taken. The winner is the one of lowest loss among those that ran to their end, as in a sweep. `noise` is the
standard deviation of a point's last loss over the three seeds, pooled over the five best points. 20 orders a task and
seed.
"""

import argparse
import heapq
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Clock, Figure, figure, write
from benchmarks.recorded import STEPS, curves
from benchmarks.sweep_curves import grid
from graftwork.tuning.judge import Judge, judge_of
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.spec import TuneSpec

TASKS = ("airport-card", "ua-parse")
ORDERS, PROCESSES = 20, 2
ASHA = {"kind": "asha", "grace_steps": 2, "reduction": 4}


def replay(trials: Sequence[TrialRecord], judge: Judge, processes: int = PROCESSES) -> dict[str, int]:
    """Steps that each trial takes when processes take trials in this order and the judge stops some."""
    waiting, taken = iter(trials), dict.fromkeys((trial.trial_id for trial in trials), 0)
    at_work: list[tuple[int, int, TrialRecord, int]] = []  # (when, tie, trial, index of the report)
    for tie in range(processes):
        _start(waiting, at_work, 0, tie)
    while at_work:
        now, tie, trial, index = heapq.heappop(at_work)
        step, loss = trial.losses[index]
        taken[trial.trial_id] = step
        last = index + 1 == len(trial.losses)
        if judge.reason_to_stop(trial.trial_id, step, loss) is None and not last:
            heapq.heappush(at_work, (now + trial.losses[index + 1][0] - step, tie, trial, index + 1))
        else:
            _start(waiting, at_work, now, tie)
    return taken


def _start(waiting: Any, at_work: list[tuple[int, int, TrialRecord, int]], now: int, tie: int) -> None:
    trial = next(waiting, None)
    if trial is not None:
        heapq.heappush(at_work, (now + trial.losses[0][0], tie, trial, 0))


def spread(by_seed: Mapping[int, Sequence[TrialRecord]]) -> float:
    """Pooled standard deviation of a point's last loss over the seeds, of the five points that are best on average."""
    ends: dict[str, list[float]] = {}
    for trials in by_seed.values():
        for trial in trials:
            ends.setdefault(str(sorted(trial.values.items())), []).append(trial.losses[-1][1])
    best = sorted(ends.values(), key=statistics.fmean)[:5]
    return float(statistics.fmean([statistics.variance(losses) for losses in best]) ** 0.5)


def one(trials: Sequence[TrialRecord], spec: TuneSpec, order: int) -> tuple[float, float, bool]:
    """Share of the grid's steps, loss given away against the grid's best, and whether the winner is the same."""
    shuffled = random.Random(order).sample(list(trials), len(trials))
    taken = replay(shuffled, judge_of(spec, []))
    ended = [trial for trial in trials if taken[trial.trial_id] == STEPS]
    best = min(trials, key=lambda trial: trial.losses[-1][1])
    found = min(ended, key=lambda trial: trial.losses[-1][1])
    share = sum(taken.values()) / (STEPS * len(trials))
    return share, found.losses[-1][1] - best.losses[-1][1], found.trial_id == best.trial_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = Clock()
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    shares, within = [], []
    for task in TASKS:
        by_seed, spec = curves(task), grid(task).with_({"scheduler": ASHA})
        noise = spread(by_seed)
        found = {seed: [one(trials, spec, order) for order in range(ORDERS)] for seed, trials in by_seed.items()}
        runs = [run for seed in found.values() for run in seed]
        shares += [share for share, _, _ in runs]
        within += [given_away <= noise for _, given_away, _ in runs]
        figures[f"{task}_share"] = figure([share for share, _, _ in runs], "of the grid's steps")
        figures[f"{task}_given_away"] = figure([given_away for _, given_away, _ in runs], "nats")
        same = sum(same for _, _, same in runs)
        detail[task] = {"noise": noise, "same_winner": same, "runs": len(runs), "by_seed": found}
        print(f"{task}: noise {noise:.4f} nats; the grid's own winner in {same} of {len(runs)}")
    figures["share"] = figure(shares, "of the grid's steps")
    figures["within_noise"] = figure([sum(within) / len(within)], "of all runs")
    write("asha", args.out, figures, detail, {"asha": ASHA, "orders": ORDERS, "processes": PROCESSES}, clock)


if __name__ == "__main__":
    main()
