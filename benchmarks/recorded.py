"""The recorded curves (benchmarks/sweep_curves.py), as trials of the grids they came from; the job of a point."""

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from graftwork.training.worker_messages import TrainJob
from graftwork.tuning.run import Sweep
from graftwork.tuning.search import Values, rows_key
from graftwork.tuning.trials import TrialRecord

CURVES = RESULTS / "sweep_curves.json"
STEPS = 16


def curves(task: str, path: Path = CURVES) -> dict[int, tuple[TrialRecord, ...]]:
    """The grid's trials by data seed, each run to its end or diverged; values without the seed."""
    rows = json.loads(path.read_text(encoding="utf-8"))["result"]["detail"][task]
    seeds = sorted({row["values"]["seed"] for row in rows})
    return {seed: tuple(_trial(row) for row in rows if row["values"]["seed"] == seed) for seed in seeds}


def _trial(row: dict[str, Any]) -> TrialRecord:
    values = {key: value for key, value in row["values"].items() if key != "seed"}
    losses = tuple((int(step), float(loss)) for step, loss in row["losses"])
    return TrialRecord(
        row["trial_id"],
        values,
        losses,
        state="failed" if row["error"] else "finished",
        steps=losses[-1][0] if losses else 0,
        wall_s=row["wall_s"],
        error=row["error"],
    )


def job_of(sweep: Sweep, values: Values) -> TrainJob:
    """Return the job of the process that trains a point of a sweep."""
    spec, every = sweep.resources(()).resolve_trial(values), sweep.spec.report_every
    rows = sweep.rows[rows_key(values)]
    return TrainJob(spec, rows, max_steps=sweep.spec.steps, report_every=every, eval_every=every)
