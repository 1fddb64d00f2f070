"""Work of one worker of a run, the same under Ray Train and in the single process of a local run."""

import signal
from collections.abc import Callable
from typing import Final

from graftwork.cluster.jobs.fencing import FenceMonitor, SupersededError
from graftwork.errors import ConfigError, GraftworkError, Interrupted, RunError, StoreUnreachable
from graftwork.training.checkpoint import CheckpointLost, Checkpoints
from graftwork.training.rewards import BadReward
from graftwork.training.worker_messages import LoopResult, NonFiniteLoss, Report, TrainJob

MAX_FAILURES: Final = 3
"""Times that a lost worker is replaced without a new checkpoint in between."""
COLLECTIVE_TIMEOUT_S: Final = 300
"""A worker that waits longer for another gives up (torch's default is 1800)."""
START_TIMEOUT_S: Final = 120
"""For all workers to be placed and alive; Ray's default of 60 s is short for a busy machine of two cores."""
ON_ALL_RANKS = (NonFiniteLoss, BadReward, CheckpointLost, SupersededError, ConfigError, StoreUnreachable)
"""Errors that every worker meets at the same step: returned, since another try would meet them again."""


def train_as_worker(job: TrainJob, report: Report | None, leaving: Callable[[], bool]) -> LoopResult | GraftworkError:
    """Run the loop in this process; return the errors of `ON_ALL_RANKS` and raise all others.

    `report` None: a run, which writes its own records and whose peak corrects later memory plans. `leaving` returns
    True once this process has notice to save and go; the attempt's stop requests (`job.fence`) are added on rank 0.
    """
    from graftwork.training.autotune import FinalPeak
    from graftwork.training.distributed import rank_and_world
    from graftwork.training.loop import run_steps

    lookout = FenceMonitor(job.fence) if job.fence is not None and rank_and_world()[0] == 0 else None
    try:
        asked = lambda: leaving() or (lookout is not None and lookout.stop_reason is not None)  # noqa: E731
        if report is not None:
            return run_steps(job, report, asked)
        final_peak = FinalPeak(job)
        result = run_steps(job, final_peak, asked)
        final_peak.learn(result)  # steps are reported on rank 0 alone
        return result
    except ON_ALL_RANKS as error:
        return error
    finally:
        if lookout is not None:
            lookout.close()


def newest_step(job: TrainJob) -> int:
    """Step of the run's newest whole checkpoint; 0 without one."""
    assert job.run is not None, "a trial is not resumed"
    mark = Checkpoints(job.run).newest()
    return mark.step if mark else 0


def require_wanted(job: TrainJob) -> None:
    """Raise Interrupted where the workers left with a checkpoint because the job is to end.

    They also leave because a machine goes away; then others replace them.
    """
    word = job.fence.stop_reason(job.spec.checkpoints.outage_s) if job.fence is not None else None
    if word is not None:
        raise Interrupted(f"training {job.spec.name}", f"it was asked to end ({word})", "", "")


def lost_worker(job: TrainJob, where: str, why: str) -> RunError:
    """Return the error of a run whose workers failed once too often."""
    return RunError(
        f"training {job.spec.name}",
        f"{where} failed: {why}",
        f"lost workers are replaced while checkpoints are made, {MAX_FAILURES} times without one",
        "run the same command: it continues from the last checkpoint",
    )


def exit_reason(status: int) -> str:
    """Return how a process ended, by its exit status as `subprocess` reports it."""
    if status >= 0:
        return f"exit code {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
    return f"signal {-status} ({name})"
