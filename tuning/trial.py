"""One trial, in its own process: the training loop of `train`, reporting held-out loss to Ray Tune."""

import math
import resource
import sys
from collections.abc import Mapping
from typing import Any

from ray import tune

from graftwork.errors import RunError
from graftwork.training.job import TrainJob
from graftwork.training.loop import run_steps
from graftwork.training.steplog import StepReport


def run_trial(config: Mapping[str, Any], jobs: Mapping[str, TrainJob]) -> None:
    """Tune's function trainable; `config["trial_id"]` picks the job. Runs in a Tune actor process.

    When the scheduler stops the trial, `tune.report` does not return: it ends this thread, and Tune the process.
    Raises RunError when a loss is not finite.
    """

    def report(step: StepReport) -> bool:
        if step.eval_loss is None:
            return True
        if not math.isfinite(step.eval_loss):
            raise RunError(f"trial {config['trial_id']}", f"held-out loss {step.eval_loss} at step {step.step}")
        tune.report({"step": step.step, "eval_loss": step.eval_loss, "peak_rss_bytes": peak_rss_bytes()})
        return True

    run_steps(jobs[config["trial_id"]], report)


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
