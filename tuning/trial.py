"""One trial, in its own process: the training loop of `train`, reporting held-out loss to Ray Tune."""

import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from graftwork.training.data import PreparedData
from graftwork.training.job import NonFiniteLoss, TrainJob
from graftwork.training.loop import run_steps
from graftwork.training.spec import TrainSpec
from graftwork.training.steplog import StepReport
from graftwork.tuning.costs import Costs


@dataclass(frozen=True)
class Told:
    """What Tune tells one process: its config, made of plain values."""

    trials: dict[str, str]
    """The resolved training spec of each trial, as JSON, by trial id."""
    rows: str
    """Key of their rows."""

    def config(self) -> dict[str, Any]:
        """For Tune."""
        return {"trials": self.trials, "rows": self.rows}


def run_trial(
    config: Mapping[str, Any], rows: Mapping[str, PreparedData], steps: int, report_every: int, board: Any
) -> None:
    """Tune's function trainable; `config` is that of `Told`. Runs in a Tune actor process.

    A trial that is to stop reads it on the board after its report, and returns. Raises NonFiniteLoss.
    """
    told = Told(**config)
    ((trial_id, asked),) = told.trials.items()
    spec = TrainSpec.model_validate_json(asked)
    costs = Costs(spec)

    def report(step: StepReport) -> bool:
        costs.add(step)
        if step.eval_loss is None:
            return True
        if not math.isfinite(step.eval_loss):
            raise NonFiniteLoss(f"trial {trial_id}", f"the held-out loss is {step.eval_loss} at step {step.step}")
        told_now = {"trials": {trial_id: [step.step, step.eval_loss]}, "metrics": {trial_id: costs.metrics()}}
        tune.report({"peak_rss_bytes": peak_rss_bytes(), **told_now})
        return all(ray.get(board.goes_on.remote([trial_id])))

    run_steps(
        TrainJob(
            spec,
            rows[told.rows],
            max_steps=steps,
            eval_every=report_every,
        ),
        report,
    )


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
