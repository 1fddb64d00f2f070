"""A job started or found by the command that names it, followed to its end, and cancelled by Ctrl-C."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TextIO

from graftwork.cluster.jobs.models import Job, JobBackend, JobStatus
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.session import terminated_as_interrupt
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import ClusterError, GraftworkError, Interrupted
from graftwork.storage.store import DEFAULT_ROOT, Store

POLL_INTERVAL_S = 0.5
PATIENCE_S = 300.0
"""Longest time that an unreachable target is asked again before the command gives up. The job continues there."""

Notify = Callable[[str], None]
"""Takes one line for the user."""


@dataclass(frozen=True)
class StartedJob:
    """Result of `start_or_find`."""

    outcome: Literal["submitted", "found", "succeeded", "resubmitted"]
    """submitted: a first attempt. found: an attempt runs. succeeded: nothing to start. resubmitted: a next attempt."""
    status: JobStatus
    previous: JobStatus | None = None
    """Ended attempt before a resubmitted one."""
    other_limits: bool = False
    """The job that was found runs with other limits than the ones given."""

    @property
    def is_ours(self) -> bool:
        """Return whether this call started the attempt. Ctrl-C cancels only such an attempt."""
        return self.outcome in ("submitted", "resubmitted")


def start_or_find(backend: JobBackend, job: Job) -> StartedJob:
    """Submit the job, find it running, or start its next attempt if the last one ended without success."""
    runs = JobStore(job.root)
    is_new = not runs.attempts(job.job_id)
    status = backend.submit(job)
    if is_new:
        return StartedJob("submitted", status)
    if not status.ended:
        recorded = ClusterSpec.model_validate(runs.job(job.job_id).cluster)
        return StartedJob("found", status, other_limits=recorded.limits != job.cluster.limits)
    if status.state == "succeeded":
        return StartedJob("succeeded", status)
    runs.amend(replace(runs.job(job.job_id), cluster=job.cluster.model_dump(mode="json")))
    return StartedJob("resubmitted", backend.resubmit(job.job_id), previous=status)


def follow(backend: JobBackend, root: str, job_id: str, stream: TextIO, notify: Notify, *, cancels: bool) -> JobStatus:
    """Copy the job's log to `stream`, all attempts from the latest on, until the job has ended.

    Ctrl-C (and SIGTERM) cancels the job if `cancels`, else only stops following. Raises Interrupted in both cases.
    """
    try:
        with terminated_as_interrupt():
            return _follow(backend, JobStore(root), job_id, stream, notify)
    except KeyboardInterrupt:
        raise _interrupted(backend, root, job_id, notify, cancels=cancels) from None


def root_flag(root: str) -> str:
    """` --root ROOT`, for a command that is to find the same store; empty for the default of this folder."""
    return "" if Store(root).uri == Store(DEFAULT_ROOT).uri else f" --root {root}"


class _Waiting:
    """Thread that runs `JobBackend.wait`, which retries as the cluster spec says and enforces the pending limit."""

    def __init__(self, backend: JobBackend, job_id: str, notify: Notify) -> None:
        self._backend, self._job_id, self._notify = backend, job_id, notify
        self._status: JobStatus | None = None
        self._error: GraftworkError | None = None
        self._thread = threading.Thread(target=self._wait, name="job-wait", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def status(self, timeout_s: float) -> JobStatus | None:
        """Return the status once the job has ended. Raises what `wait` raised."""
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._status

    def _wait(self) -> None:
        try:
            self._status = _retry_unreachable(lambda: self._backend.wait(self._job_id), self._backend.on, self._notify)
        except GraftworkError as error:
            self._error = error


def _follow(backend: JobBackend, runs: JobStore, job_id: str, stream: TextIO, notify: Notify) -> JobStatus:
    waiting = _Waiting(backend, job_id, notify)
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


def _retry_unreachable(ask: Callable[[], JobStatus], on: str, notify: Notify) -> JobStatus:
    """Call `ask` again while the target is unreachable, for PATIENCE_S since its last answer."""
    began: float | None = None
    while True:
        asked_at = time.monotonic()
        try:
            return ask()
        except ClusterError as error:
            now = time.monotonic()
            if began is None or now - asked_at > PATIENCE_S:  # the target answered in between
                began = now
                notify(f"{on} does not answer ({error.problem}); the job continues there: asking again")
            if now - began > PATIENCE_S:
                raise
            time.sleep(2 * POLL_INTERVAL_S)


def _interrupted(backend: JobBackend, root: str, job_id: str, notify: Notify, *, cancels: bool) -> Interrupted:
    flag = root_flag(root)
    if not cancels:
        return Interrupted(
            f"job {job_id}",
            "it goes on: this command found it at work",
            "",
            f"graftwork jobs logs -f {job_id}{flag}; or: graftwork jobs cancel {job_id}",
        )
    notify(f"Ctrl-C: cancelling {job_id} at {backend.on}; a second Ctrl-C stops waiting for that")
    try:
        status = backend.cancel(job_id)
    except (KeyboardInterrupt, ClusterError) as error:
        why = f" ({error.problem})" if isinstance(error, ClusterError) else ""
        return Interrupted(
            f"job {job_id}", f"it may still run at {backend.on}{why}", "", f"graftwork jobs cancel {job_id}{flag}"
        )
    return Interrupted(
        f"job {job_id}",
        f"{status.state} at {backend.on} by Ctrl-C",
        "what was committed stays valid; --detach leaves a job to run",
        "run the same command: it goes on from the last checkpoint",
    )
