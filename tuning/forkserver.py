"""Trials in fresh processes without the imports: a server beside the trial's process has them, and forks for each.

torch, transformers, PEFT and TRL take 5 CPU seconds to import. Tune keeps a trial's process for the next trial
(`reuse_actors`), and that process keeps its server; the training itself lies in a fork, so its memory goes back to the
machine with it (a process that trains twice keeps adapters: peft issue 2221). On CPUs alone: no fork may use CUDA.
"""

import contextlib
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

from graftwork.environment import peak_rss_bytes
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob
from graftwork.tuning.distributed_trial import ReportFn

PRELOADED = (
    "graftwork.training.loop",
    "graftwork.training.callback",
    "graftwork.training.checkpoint_resume",
    "graftwork.training.adapters.attach",
    "graftwork.training.evaluation.run",
    "graftwork.training.objectives.trainer",
    "trl.trainer.sft_trainer",
)
"""What the loop imports when it runs; other objectives take what they need beside it."""


class Forked:
    """A server process and the wire to it; gone with this process. One trial at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "graftwork.tuning.forkserver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._wire = Connection(ours.detach())

    def train(self, job: TrainJob, report: ReportFn) -> LoopResult:
        """`training.loop.run_steps` in a fork; `report` is called here, and what it raises ends the fork.

        Raises what the loop raises, and WorkerCrashedError when the fork or its server was killed.
        """
        outcome: LoopResult | Exception | None = None
        try:
            self._wire.send_bytes(pickle.dumps(job))
            while (told := self._wire.recv())[0] != "end":
                kind, said = told
                if kind == "step":
                    self._wire.send(report(*said))
                else:
                    outcome = said
        except (EOFError, ConnectionError) as error:
            self.close()
            raise _crashed("the process that forks for trials is gone") from error
        except BaseException:  # of `report`: the fork is in the middle of its work
            self.close()
            raise
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is None:
            self.close()  # an answer to the dead fork may lie on the wire
            raise _crashed(f"the trial's process ended with {_how(told[1])}")
        return outcome

    def close(self) -> None:
        """End the server and what it forked."""
        self._wire.close()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of the server; its children train."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None and not self._wire.closed


_here: Forked | None = None


def forked() -> Forked:
    """This process' server, started when it is first asked for, and again where it is gone."""
    global _here
    if _here is None or not _here.alive:
        _here = Forked()
    return _here


def _crashed(why: str) -> Exception:
    from ray.exceptions import WorkerCrashedError

    class TrialProcessDied(WorkerCrashedError):  # type: ignore[misc]  # Ray carries no types; its own has a fixed text
        def __str__(self) -> str:
            return why

    error: Exception = TrialProcessDied()
    return error


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def serve(wire: Connection) -> None:
    """The server: fork for each job that comes, until nobody is at the other end."""
    for module in PRELOADED:
        importlib.import_module(module)
    while True:
        try:
            job = wire.recv_bytes()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _run(wire, job)
        status = _awaited(wire, child)
        try:
            wire.send(("end", status))
        except OSError:
            return


def _run(wire: Connection, job: bytes) -> None:
    """The fork: never returns."""
    from graftwork.training.loop import run_steps

    def report(step: StepReport) -> bool:
        wire.send(("step", (step, peak_rss_bytes())))
        return bool(wire.recv())

    told: tuple[str, Any]
    try:
        told = ("result", run_steps(pickle.loads(job), report))
    except BaseException as error:  # the top of a process
        told = ("error", error)
    with contextlib.suppress(OSError):
        wire.send(_sendable(told))
    os._exit(0)


def _sendable(told: tuple[str, Any]) -> tuple[str, Any]:
    try:
        pickle.loads(pickle.dumps(told))
    except Exception:  # an error of somebody's library
        return told[0], RuntimeError(f"{type(told[1]).__name__}: {told[1]}")
    return told


def _awaited(wire: Connection, child: int) -> int:
    """The fork's end, as `subprocess` tells it. Killed when the trial's process is gone, who would read its reports."""
    ended, hung_up = os.pidfd_open(child), wire.fileno()
    watch = select.poll()
    watch.register(ended, select.POLLIN)
    watch.register(hung_up, 0)  # POLLHUP alone: what is sent is for the fork to read
    try:
        if ended not in dict(watch.poll()):
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(ended)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
