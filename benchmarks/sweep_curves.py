"""Held-out losses of every point of a grid, recorded once: what searches and schedulers are compared on.

    python -m benchmarks.sweep_curves TASK FOLDER       records, into FOLDER/TASK.jsonl
    python -m benchmarks.sweep_curves join FOLDER       benchmarks/results/sweep_curves.json of what was recorded

TASK is `airport-card`, `ua-parse` (LoRA: rank x learning rate x seed, 60 and 45 points) or `full` (all weights on
airport-card: learning rate x seed, 14 points). Every point is the loop of a sweep's trial, on SmolLM2-135M, in this
process, one after the other; a point that is there already is not run again. The losses don't depend on the machine's
load; the seconds do.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.base import URI
from benchmarks.record import Clock, figure, write
from benchmarks.recorded import job_of
from graftwork import config
from graftwork.training.loop import run_steps
from graftwork.training.worker_messages import NonFiniteLoss, StepReport
from graftwork.tuning.run import Sweep
from graftwork.tuning.search import FixedPoints, digest
from graftwork.tuning.spec import TuneSpec

TASKS = ("airport-card", "ua-parse", "full")
SEEDS = [0, 1, 2]
RANKS = {"airport-card": [1, 4, 16, 64], "ua-parse": [1, 4, 16]}
LORA_LR = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
FULL_LR = [5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]
AROUND = [5e-5, 1e-4, 2e-4, 4e-4]
"""Of all weights, the rates that the seeds after the first are run at: a point takes two minutes."""
ROWS, HELD_OUT = {"airport-card": 8, "ua-parse": 4}, {"airport-card": 16, "ua-parse": 12}
"""Rows a step and held-out rows; those of ua-parse are three times as long."""
SYSTEMS = {"airport-card": "Answer with one airport card as JSON.", "ua-parse": "Parse the user agent into JSON."}


def grid(task: str) -> TuneSpec:
    """The sweep whose every trial is recorded."""
    name = "airport-card" if task == "full" else task
    train: dict[str, Any] = {
        "name": name,
        "base": URI,
        "data": {"train": f"recipe://{name}/train.jsonl", "eval": f"recipe://{name}/valid.jsonl"},
        "prompt": {"system": SYSTEMS[name]},
        "optim": {"rows_per_step": ROWS[name], "micro_batch": 4, "warmup_ratio": 0, "schedule": "constant"},
        "num_workers": 1,
    }
    space: dict[str, Any] = {"seed": SEEDS, "adapter.rank": RANKS[name], "optim.lr": LORA_LR}
    if task == "full":
        train |= {"adapter": {"kind": "full"}, "quant": {"kind": "none"}}
        train["optim"] |= {"lr": FULL_LR[0]}  # all weights must name one
        space = {"seed": SEEDS, "optim.lr": FULL_LR}
    given = {
        "name": f"grid-{task}",
        "train": train,
        "space": {key: {"kind": "choice", "values": values} for key, values in space.items()},
        "num_trials": math.prod(len(values) for values in space.values()),
        "steps": 16,
        "report_every": 2,
        "eval_rows": HELD_OUT[name],
        "scheduler": None,
    }
    return config.validate(TuneSpec, given, where=f"grid of {task}")


def record(task: str, out: Path) -> None:
    """Append a line for each point that is missing."""
    done = {row["trial_id"] for row in _lines(out)} if out.exists() else set()
    sweep = Sweep.resolve(grid(task))
    assert isinstance(sweep.search, FixedPoints)
    for values in sweep.search.points:
        trial_id = digest(values)
        if trial_id in done or (task == "full" and values["seed"] != SEEDS[0] and values["optim.lr"] not in AROUND):
            continue
        losses: list[tuple[int, float]] = []

        def report(step: StepReport, into: list[tuple[int, float]] = losses) -> bool:
            if step.eval_loss is not None:
                into.append((step.step, step.eval_loss))
            return True

        started = time.monotonic()
        error = None
        try:
            run_steps(job_of(sweep, values), report)
        except NonFiniteLoss as diverged:
            error = str(diverged)
        row = {"trial_id": trial_id, "values": values, "losses": losses, "error": error}
        with out.open("a") as file:
            file.write(json.dumps({**row, "wall_s": round(time.monotonic() - started, 2)}) + "\n")


def join(folder: Path) -> None:
    """Write the document that `benchmarks.recorded` reads."""
    rows = {task: _lines(folder / f"{task}.jsonl") for task in TASKS if (folder / f"{task}.jsonl").exists()}
    counts = {f"points_{task}": figure([float(len(lines))], "points") for task, lines in rows.items()}
    write("sweep_curves", None, counts, rows, {task: grid(task).model_dump(mode="json") for task in rows}, Clock())


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=(*TASKS, "join"))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.task == "join":
        join(asked.folder)
    else:
        record(asked.task, asked.folder / f"{asked.task}.jsonl")
