"""A job followed to its end: what it prints, its retries and limits, and what Ctrl-C does."""

import threading
import time
from collections.abc import Callable
from typing import TextIO

from graftwork.cli.job_words import root_flag
from graftwork.cli.output import stderr
from graftwork.cluster.backend import JobBackend, JobStatus
from graftwork.cluster.run_store import JobStore
from graftwork.cluster.session import terminated_as_interrupt
from graftwork.errors import ClusterError, GraftworkError, Interrupted

POLL_INTERVAL_S = 0.5
PATIENCE_S = 300.0
"""How long a place that does not answer is asked again before the command gives up; the job goes on there."""


class _Waiting:
    """Run `JobBackend.wait` in a thread: it retries as the cluster says, and enforces the pending limit."""

    def __init__(self, backend: JobBackend, job_id: str) -> None:
        self._backend, self._job_id = backend, job_id
        self._status: JobStatus | None = None
        self._error: GraftworkError | None = None
        self._thread = threading.Thread(target=self._wait, name="job-wait", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def status(self, timeout_s: float) -> JobStatus | None:
        """Once it has ended. Raises what `wait` raised."""
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._status

    def _wait(self) -> None:
        try:
            self._status = _patiently(lambda: self._backend.wait(self._job_id), self._backend.on)
        except GraftworkError as error:
            self._error = error


def follow(backend: JobBackend, root: str, job_id: str, stream: TextIO, *, cancels: bool) -> JobStatus:
    """Print what the job prints, all attempts from the latest on, until it has ended.

    Ctrl-C (and SIGTERM) cancels the job where `cancels`, else only stops looking; raises Interrupted either way.
    """
    try:
        with terminated_as_interrupt():
            return _follow(backend, JobStore(root), job_id, stream)
    except KeyboardInterrupt:
        raise _interrupted(backend, root, job_id, cancels=cancels) from None


def _follow(backend: JobBackend, runs: JobStore, job_id: str, stream: TextIO) -> JobStatus:
    waiting = _Waiting(backend, job_id)
    first, shown = max(runs.attempts(job_id), default=1), dict[int, dict[str, int]]()
    while True:
        done = waiting.done
        for number in [n for n in runs.attempts(job_id) if n >= first]:
            for text in runs.logs(job_id, number, shown.setdefault(number, {})):
                stream.write(text)
                stream.flush()
        status = waiting.status(POLL_INTERVAL_S)
        if done and status is not None:
            return status


def _patiently(ask: Callable[[], JobStatus], on: str) -> JobStatus:
    """Ask again while the place is out of reach."""
    began: float | None = None
    while True:
        asked_at = time.monotonic()
        try:
            return ask()
        except ClusterError as error:
            now = time.monotonic()
            if began is None or now - asked_at > PATIENCE_S:  # it answered meanwhile
                began = now
                stderr.print(f"{on} does not answer ({error.problem}); the job goes on there: asking again",
                             markup=False, soft_wrap=True)  # fmt: skip
            if now - began > PATIENCE_S:
                raise
            time.sleep(2 * POLL_INTERVAL_S)


def _interrupted(backend: JobBackend, root: str, job_id: str, *, cancels: bool) -> Interrupted:
    flag = root_flag(root)
    if not cancels:
        return Interrupted(f"job {job_id}", "it goes on: this command found it at work", "",
                           f"graftwork jobs logs -f {job_id}{flag}; or: graftwork jobs cancel {job_id}")  # fmt: skip
    stderr.print(f"Ctrl-C: cancelling {job_id} at {backend.on}; once more leaves that to you", markup=False,
                 soft_wrap=True)  # fmt: skip
    try:
        status = backend.cancel(job_id)
    except (KeyboardInterrupt, ClusterError) as error:
        why = f" ({error.problem})" if isinstance(error, ClusterError) else ""
        return Interrupted(f"job {job_id}", f"it may still run at {backend.on}{why}", "",
                           f"graftwork jobs cancel {job_id}{flag}")  # fmt: skip
    return Interrupted(f"job {job_id}", f"{status.state} at {backend.on} by Ctrl-C",
                       "what was committed stays valid; --detach leaves a job to run",
                       "run the same command: it goes on from the last checkpoint")  # fmt: skip
