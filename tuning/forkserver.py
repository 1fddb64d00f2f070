"""Trials in processes that multiprocessing's fork server forks, with the imports of the training loop preloaded.

torch, transformers, PEFT and TRL take 5 CPU seconds to import. Tune reuses a trial's process for the next trial
(`reuse_actors`), and that process keeps its server. Each training runs in a fork, so that its memory is returned to the
machine (a process that trains twice keeps adapters: peft issue 2221). On CPUs only: no fork may use CUDA.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from ray.exceptions import WorkerCrashedError

from graftwork.cluster.private_ray import environment_of
from graftwork.environment import peak_rss_bytes
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob

ReportFn = Callable[[StepReport, int], bool]
"""Takes a step's report and the largest resident set of its process; returns False to stop the trial."""
PRELOADED = (
    "__main__",
    "graftwork.training.loop",
    "graftwork.training.callback",
    "graftwork.training.checkpoint_resume",
    "graftwork.training.adapters.attach",
    "graftwork.training.evaluation.run",
    "graftwork.training.objectives.trainer",
    "trl.trainer.sft_trainer",
)
"""The main module, which each fork would import otherwise, and what the loop imports when it runs."""
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(list(PRELOADED))


def train_in_fork(job: TrainJob, report: ReportFn) -> LoopResult:
    """`training.loop.run_steps` in a fork; `report` is called here, and an exception that it raises ends the fork.

    Raises what the loop raises, and WorkerCrashedError when the fork was killed. The fork ends with this process.
    """
    ours, theirs = _forkserver.Pipe()
    process = _forkserver.Process(target=_train, args=(theirs, job), name="trial")
    with environment_of({"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):  # the server ignores sys.path
        process.start()
    theirs.close()
    try:
        with ours:
            outcome = _follow(ours, report)
    finally:
        process.kill()  # a fork that has sent its outcome has nothing left to do
        process.join()
    if outcome is None:
        raise TrialProcessDied(process.exitcode)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _follow(ours: Connection, report: ReportFn) -> LoopResult | BaseException | None:
    """Answer the fork's reports until it sends its outcome; None where it ended without one."""
    while True:
        try:
            kind, value = ours.recv()
        except (EOFError, ConnectionError):
            return None
        if kind != "step":
            outcome: LoopResult | BaseException = value
            return outcome
        goes_on = report(*value)
        with contextlib.suppress(ConnectionError):  # the fork is gone: the next recv raises EOFError
            ours.send(goes_on)


def _train(wire: Connection, job: TrainJob) -> None:
    """Run the loop in the fork, and send its reports and its outcome."""
    from graftwork.training.loop import run_steps

    threading.Thread(target=_end_with_parent, name="parent-monitor", daemon=True).start()

    def report(step: StepReport) -> bool:
        wire.send(("step", (step, peak_rss_bytes())))
        return bool(wire.recv())

    message: tuple[str, Any]
    try:
        message = ("result", run_steps(job, report))
    except BaseException as error:  # the top of a process
        message = ("error", error)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error class of another library, which may raise anything
            message = ("error", RuntimeError(f"{type(error).__name__}: {error}"))
    with contextlib.suppress(OSError):
        wire.send(message)


def _end_with_parent() -> None:
    """Kill this process when the trial's process has ended: no other process reads its reports."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a fork"
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


class TrialProcessDied(WorkerCrashedError):  # type: ignore[misc]  # Ray carries no types; its own has a fixed text
    """The fork of a trial ended without an outcome."""

    def __init__(self, exit_code: int | None) -> None:
        died = exit_code is not None and exit_code < 0
        self.how = f"signal {-exit_code}" if died and exit_code is not None else f"exit code {exit_code}"

    def __str__(self) -> str:
        return f"the trial's process ended with {self.how}"
