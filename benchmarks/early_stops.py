"""Is what a sweep's page says of its early stops true? Successive halving on recorded curves, whose ends are known.

    python -m benchmarks.early_stops

As in benchmarks/asha.py, over four settings of ASHA. The page's bound (`tuning/report.py`) says how much loss the
stopped trials may have cost, from the finished ones alone; what they did cost is in the recording.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.asha import ORDERS, TASKS
from benchmarks.asha import replay as taken_of
from benchmarks.record import Clock, figure, write
from benchmarks.recorded import CURVES, STEPS, curves
from benchmarks.sweep_curves import grid
from graftwork.tuning.early_stopping import stopping_rule
from graftwork.tuning.report import stops, trial_of
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TrialRecord

SETTINGS = [(2, 2), (4, 2), (2, 4), (4, 4)]
"""Grace steps and reduction."""


def one(trials: Sequence[TrialRecord], spec: TuneSpec, order: int) -> tuple[float, float | None] | None:
    """Loss that early stops cost, and the bound that the page gives; None where none was stopped."""
    shuffled = random.Random(order).sample(list(trials), len(trials))
    taken = taken_of(shuffled, stopping_rule(spec, []))
    seen = [_until(trial, taken[trial.trial_id]) for trial in shuffled]
    best = min((trial for trial in seen if trial.state == "finished"), key=lambda trial: trial.losses[-1][1])
    found = stops([trial_of(trial) for trial in seen], best.trial_id, STEPS)
    if found is None:
        return None
    lowest = min(trial.losses[-1][1] for trial in trials)
    return best.losses[-1][1] - lowest, found.regret


def _until(trial: TrialRecord, step: int) -> TrialRecord:
    losses = tuple(report for report in trial.losses if report[0] <= step)
    return replace(trial, losses=losses, steps=step, state="finished" if step >= STEPS else "stopped")


def main() -> None:
    """Replay, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    clock = Clock()
    detail: list[dict[str, Any]] = []
    for task in TASKS:
        for seed, trials in curves(task, asked.curves).items():
            for grace, reduction in SETTINGS:
                asha = {"kind": "asha", "grace_steps": grace, "reduction": reduction}
                spec = grid(task).with_({"scheduler": asha})
                runs = [run for order in range(ORDERS) if (run := one(trials, spec, order)) is not None]
                told = [(cost, bound) for cost, bound in runs if bound is not None]
                detail.append(
                    {
                        "task": task,
                        "seed": seed,
                        **asha,
                        "replays": len(runs),
                        "told": len(told),
                        "held": sum(cost <= bound + 1e-9 for cost, bound in told),
                        "cost": [cost for cost, _ in runs],
                        "bound": [bound for _, bound in told],
                    }
                )
    every = [(one["held"] / one["told"]) for one in detail if one["told"]]
    whole = sum(one["held"] for one in detail) / sum(one["told"] for one in detail)
    figures = {
        "held": figure([whole], "of replays with a bound"),
        "held_by_setting": figure(every, "of replays with a bound"),
        "cost": figure([cost for one in detail for cost in one["cost"]], "nats"),
        "bound": figure([bound for one in detail for bound in one["bound"]], "nats"),
    }
    write("early_stops", asked.out, figures, detail, {"orders": ORDERS, "settings": SETTINGS}, clock)


if __name__ == "__main__":
    main()
