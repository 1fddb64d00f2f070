"""What early stopping saves, and whether it still finds the winner: ASHA on recorded curves against the whole grid.

    python -m benchmarks.asha

The grid's trials (rank x learning rate, 20 and 15 points, SmolLM2-135M, 16 steps; two tasks, three seeds of data and
start) were run to their ends once (benchmarks/sweep_curves.py). Here processes take them in the order of a sweep's grid
(`grid`: the middle first; one to four processes) or in a shuffled one (`shuffled`: two processes, 20 orders), a step of
any trial taking one unit of time, and the sweep's own judge says after each report who goes on. Compute is steps taken.
All of it with the reduction of the examples (4) and with what a spec takes by default (`default`).
The winner is the one of lowest loss among those that ran to their end, as in a sweep. `noise` is the standard deviation
of a point's last loss over the three seeds, pooled over the five best points.
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
from graftwork.tuning.early_stopping import StoppingRule, stopping_rule
from graftwork.tuning.plan import search_of
from graftwork.tuning.search import FixedPoints
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TrialRecord

TASKS = ("airport-card", "ua-parse")
ORDERS, PROCESSES, AT_ONCE = 20, 2, (1, 2, 3, 4)
ASHA = {"kind": "asha", "grace_steps": 2, "reduction": 4}
SETTINGS: dict[str, dict[str, Any]] = {"": ASHA, "default_": {"kind": "asha"}}
"""Prefix of the figures -> the spec's `scheduler`."""


def replay(trials: Sequence[TrialRecord], judge: StoppingRule, processes: int = PROCESSES) -> dict[str, int]:
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


def one(trials: Sequence[TrialRecord], spec: TuneSpec, processes: int = PROCESSES) -> tuple[float, float, bool]:
    """Share of the grid's steps, loss given away against the grid's best, and whether the winner is the same."""
    taken = replay(trials, stopping_rule(spec, []), processes)
    ended = [trial for trial in trials if taken[trial.trial_id] == STEPS]
    best = min(trials, key=lambda trial: trial.losses[-1][1])
    found = min(ended, key=lambda trial: trial.losses[-1][1])
    share = sum(taken.values()) / (STEPS * len(trials))
    return share, found.losses[-1][1] - best.losses[-1][1], found.trial_id == best.trial_id


def orders(task: str, trials: Sequence[TrialRecord], spec: TuneSpec) -> dict[str, list[tuple[float, float, bool]]]:
    """What came of each order."""
    search = search_of(grid(task).with_({"space.seed": {"kind": "choice", "values": [0]}}))
    assert isinstance(search, FixedPoints)
    own = [{key: value for key, value in point.items() if key != "seed"} for point in search.points]
    in_order = sorted(trials, key=lambda trial: own.index(trial.values))
    shuffled = [random.Random(order).sample(list(trials), len(trials)) for order in range(ORDERS)]
    return {
        "grid": [one(in_order, spec, processes) for processes in AT_ONCE],
        "shuffled": [one(some, spec) for some in shuffled],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = Clock()
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    for prefix, scheduler in SETTINGS.items():
        found, runs = measured(scheduler)
        detail |= {f"{prefix}{task}": one for task, one in found.items()}
        for name, ran in runs.items():
            figures[f"{prefix}{name}_share"] = figure([share for share, _, _ in ran], "of the grid's steps")
            figures[f"{prefix}{name}_given_away"] = figure([given_away for _, given_away, _ in ran], "nats")
            within = sum(within for _, _, within in ran) / len(ran)
            share = Figure(value=within, q1=within, q3=within, n=len(ran), unit="of all runs")
            figures[f"{prefix}{name}_within_noise"] = share
    write("asha", args.out, figures, detail, {"settings": SETTINGS, "orders": ORDERS, "processes": PROCESSES}, clock)


Ran = tuple[float, float, bool]
"""Share of the grid's steps, loss given away, and whether that is within the deviation over the seeds."""


def measured(scheduler: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Ran]]]:
    """(detail by task, replays by order: of both tasks and of each)."""
    detail: dict[str, Any] = {}
    runs: dict[str, list[Ran]] = {}
    for task in TASKS:
        by_seed, spec = curves(task), grid(task).with_({"scheduler": scheduler})
        noise = spread(by_seed)
        found = {seed: orders(task, trials, spec) for seed, trials in by_seed.items()}
        for order in ("grid", "shuffled"):
            all_of = [run for seed in found.values() for run in seed[order]]
            judged = [(share, given_away, given_away <= noise) for share, given_away, _ in all_of]
            runs.setdefault(order, []).extend(judged)
            runs[f"{task}_{order}"] = judged
        detail[task] = {
            "scheduler": spec.scheduler.model_dump() if spec.scheduler else None,
            "noise": noise,
            "by_seed": found,
        }
    return detail, runs


if __name__ == "__main__":
    main()
