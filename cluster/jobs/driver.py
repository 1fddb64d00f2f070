"""Driver of an attempt: a process that runs its command, monitors its limits and ends it in time.

It runs on the machine that Ray drives the work from: the head, or this one. The command is a process of its own, so
that the driver can report a hang, a crash or a lack of memory. heartbeat.py reports to the store that the driver lives
and stores the output, supervisor.py ends all processes of the job with the driver.

A training run first gets a request through the store (fencing.py) to write a checkpoint of its current step and leave;
then, as any other command at once, SIGTERM; then SIGKILL.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from graftwork.cluster.jobs.backend import usd_per_hour
from graftwork.cluster.jobs.fencing import ENVIRONMENT, Fence
from graftwork.cluster.jobs.heartbeat import HeartbeatThread, OutputReader
from graftwork.cluster.jobs.store import SAVES, AttemptEnd, JobStore, StopReason
from graftwork.cluster.jobs.supervisor import run_supervised
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import StorageError
from graftwork.storage.store import json_bytes

POLL_INTERVAL_S = 0.1
ASK_S = 1.0
"""Interval at which `LimitMonitor` reads the store."""
PATIENCE_S = 900.0
SAVE_S: Mapping[StopReason | None, float] = {None: 75.0, "user": 20.0, "superseded": 5.0}
LIMIT_SAVE_S = 120.0
"""How long that may take. None: the machine goes away, as a pod does 120 s after its notice."""
TERMINATE_S: Mapping[StopReason | None, float] = {None: 20.0, "user": 3.0, "superseded": 3.0}
LIMIT_TERMINATE_S = 30.0
"""How long the command may take to end after SIGTERM."""
LIMIT_GRACE_S = LIMIT_SAVE_S + LIMIT_TERMINATE_S
"""Longest time from a limit to the end of the command."""
CLOSE_S = 60.0
"""How long the last words may take to reach the store, where another driver may go on."""
NOT_FOUND = 127
"""What a shell says of a program that is not there."""
COMMAND = "from graftwork.cli import main; main()"
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "Cannot allocate memory", "MemoryError")


def drive(root: str, job_id: str, number: int, on: str) -> int:
    """Run the attempt to its end and return the command's exit code; 0 at once for an attempt that is over."""
    runs = JobStore(root, PATIENCE_S)
    record = runs.attempt(job_id, number)
    if record.ended or record.cancel or runs.attempts(job_id)[-1] != number:
        print(f"{job_id}-a{number} is over: nothing to do", file=sys.stderr)
        return 0
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    starts = ("jobs", job_id, f"a{number}", "starts")
    facts = {"at": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    start = len(runs.store.list(*starts)) + 1
    while not runs.store.create_bytes(json_bytes(facts), *starts, f"{start}.json"):
        start += 1  # the next free number fences off all earlier drivers of the attempt
    fence, kind = Fence(root, job_id, number, start), runs.job(job_id).kind
    with tempfile.TemporaryDirectory(prefix="gw-job-") as folder:
        file = Path(folder) / "spec.yaml"
        file.write_bytes(json_bytes(runs.spec(job_id)))
        command = [sys.executable, "-u", "-c", COMMAND, kind, str(file), "--target", on]
        if kind == "exec":
            command = [str(word) for word in runs.spec(job_id)["argv"]]
        try:
            return _Drive(runs, fence, command, terminated).run()
        except _CannotStart as error:
            runs.end(job_id, number, AttemptEnd(time.time(), NOT_FOUND, None, str(error)))
            return NOT_FOUND


class _CannotStart(Exception):
    """There is no such program, or its arguments are too long."""


class _Drive:
    """One command from its start to its end."""

    def __init__(self, runs: JobStore, fence: Fence, command: list[str], terminated: threading.Event) -> None:
        self._runs, self._fence, self._terminated = runs, fence, terminated
        record, quick = runs.job(fence.job_id), JobStore(fence.root)
        environment = {**os.environ, ENVIRONMENT: fence.dump()}
        try:
            self._child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
            raise _CannotStart(f"{command[0]} does not start: {error}") from error
        self._output = OutputReader(runs.store, (*fence.folder, "logs"), fence.start, self._child)
        attempt = runs.attempt(fence.job_id, fence.attempt)
        before = runs.attempt(fence.job_id, fence.attempt - 1).heartbeat if fence.attempt > 1 else None
        spent_s = time.time() - attempt.started_at if attempt.started_at is not None else 0.0
        spent_usd = before.usd or 0.0 if before is not None else 0.0  # the last heartbeat counted all attempts
        self._limits = LimitMonitor(quick, fence, record.job(fence.root, {}).cluster, spent_s, spent_usd)
        self._heartbeat = HeartbeatThread(quick, fence, lambda: self._output.progress, self._limits.usd)
        self._heartbeat.note("started", host=socket.gethostname(), pid=os.getpid())
        self._saves = record.kind in SAVES
        self._reason: StopReason | None = None
        self._killed = False

    def run(self) -> int:
        """Run to the end and return the exit code."""
        while self._child.poll() is None and not self._terminated.is_set() and self._reason is None:
            self._reason = self._limits.reason()
            time.sleep(POLL_INTERVAL_S)
        if self._child.poll() is None:
            self._end()
        elif self._child.returncode and self._reason is None:
            self._reason = self._limits.look()
        self._limits.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)  # processes that left the group are the supervisor's
        code = self._child.wait()
        return self._record_end(code if code >= 0 else 128 - code)

    def _end(self) -> None:
        """End the command: by a request in the store, by SIGTERM, by SIGKILL."""
        if self._reason is None:
            self._heartbeat.leave()
        else:
            self._heartbeat.note("asked-to-end", reason=self._reason)
            if self._reason in ("deadline", "budget"):  # in a thread: the store may be out of reach
                ask = (self._fence.job_id, self._fence.attempt, self._reason)
                threading.Thread(target=self._runs.ask_to_end, args=ask, name="ask-to-end", daemon=True).start()
        if self._saves and self._output.under_way:
            self._await_end(SAVE_S.get(self._reason, LIMIT_SAVE_S))
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            self._await_end(TERMINATE_S.get(self._reason, LIMIT_TERMINATE_S))
        if self._child.poll() is None:
            self._killed = True

    def _await_end(self, timeout_s: float) -> None:
        """Wait until the command has ended, for `timeout_s`, or until a more urgent request arrives."""
        end, began_with = time.monotonic() + timeout_s, self._reason
        while self._child.poll() is None and time.monotonic() < end:
            self._reason = self._reason or self._limits.reason()
            if self._reason is not None and (began_with is None or self._terminated.is_set()):
                return
            time.sleep(POLL_INTERVAL_S)

    def _record_end(self, code: int) -> int:
        """Record the end, after all output. SIGTERM without a reason to stop is no end of the job: another driver
        continues it."""
        goes_on = self._reason == "superseded" or (self._terminated.is_set() and self._reason is None and code != 0)
        patience_s = CLOSE_S if goes_on else PATIENCE_S
        self._output.close(patience_s)
        if not goes_on:
            memory = (
                code != 0
                and not self._reason
                and ((code == 137 and not self._killed) or self._output.mentions(*OUT_OF_MEMORY))
            )
            message = self._output.last_error() if code != 0 else ""
            ended = AttemptEnd(time.time(), code, self._reason, message, memory)
            self._runs.end(self._fence.job_id, self._fence.attempt, ended)
        self._heartbeat.note("left" if goes_on else "ended", exit_code=code, reason=self._reason)
        self._heartbeat.close(min(patience_s, CLOSE_S))
        return code


class LimitMonitor:
    """Thread that reads the store every ASK_S, so that limits hold while the store is out of reach."""

    def __init__(
        self, runs: JobStore, fence: Fence, cluster: ClusterSpec, spent_s: float = 0.0, spent_usd: float = 0.0
    ) -> None:
        """`spent_s`: since the attempt's first driver started; `spent_usd`: by earlier attempts."""
        self._runs, self._fence, self._limits = runs, fence, cluster.limits
        self._usd_hour = usd_per_hour(cluster)
        self._began, self._end = time.monotonic() - spent_s, threading.Event()
        self._spent_usd = spent_usd
        self._asked: StopReason | None = None
        threading.Thread(target=self._poll, name="limit-monitor", daemon=True).start()

    def usd(self) -> float | None:
        """What the job has cost, all attempts together."""
        return None if self._usd_hour is None else self._spent_usd + self._usd_hour * self.elapsed_s() / 3600

    def elapsed_s(self) -> float:
        """Since the attempt's first start."""
        return time.monotonic() - self._began

    def reason(self) -> StopReason | None:
        """Why to end now; None where nothing says so. Never waits."""
        if self._asked is not None:
            return self._asked
        if self._limits.deadline is not None and self.elapsed_s() > self._limits.deadline:
            return "deadline"
        spent = self.usd()
        if self._limits.budget_usd is not None and spent is not None and spent > self._limits.budget_usd:
            return "budget"
        return None

    def look(self) -> StopReason | None:
        """As `reason`, after a look into the store now. For a command that has ended: its workers look too, and may
        have seen a request first."""
        with contextlib.suppress(StorageError):  # an outage: the command's own exit code stands
            self._asked = self._asked or self._find_reason()
        return self.reason()

    def close(self) -> None:
        """Look no more."""
        self._end.set()

    def _poll(self) -> None:
        while self._asked is None and not self._end.is_set():
            with contextlib.suppress(StorageError):  # an outage: asked again
                self._asked = self._find_reason()
            self._end.wait(ASK_S)

    def _find_reason(self) -> StopReason | None:
        if self._fence.superseded():
            return "superseded"
        return self._runs.cancel_reason(self._fence.job_id, self._fence.attempt)


if __name__ == "__main__":
    root, job_id, number, on = sys.argv[1:]
    sys.exit(run_supervised(lambda: drive(root, job_id, int(number), on)))
