"""A process beside the work that runs the command of an attempt, tells the store of it, and ends it in time.

It runs on the machine that Ray drives the work from: the head, or this one. The command is a process of its own, so
that what it does (hang, crash, run out of memory) leaves somebody to say so.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from graftwork.cluster.driver.output import Output
from graftwork.cluster.driver.watch import Watch
from graftwork.cluster.fence import ENVIRONMENT, Fence
from graftwork.cluster.run_store import HEARTBEAT_S, Ended, Heartbeat, RunStore, StopReason
from graftwork.storage import json_bytes

LOOK_S = 0.5
PATIENCE_S = 900.0
GRACE_S = {"user": 3.0, "superseded": 3.0}
"""How long the command may take to end once it was told; limits leave it the time for a checkpoint."""
LIMIT_GRACE_S = 120.0
COMMAND = "from graftwork.cli import main; main()"


def drive(root: str, job_id: str, number: int, on: str) -> int:
    """Run the attempt to its end; the command's exit code. 0 at once where the attempt is over, or another one's."""
    runs = RunStore(root, PATIENCE_S)
    record = runs.attempt(job_id, number)
    if record.ended or record.cancel or runs.attempts(job_id)[-1] != number:
        print(f"{job_id}-a{number} is over: nothing to do", file=sys.stderr)
        return 0
    start = _take_start(runs, job_id, number)
    fence = Fence(root, job_id, number, start)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    with tempfile.TemporaryDirectory(prefix="gw-job-") as folder:
        file = Path(folder) / "spec.yaml"
        file.write_bytes(json_bytes(runs.spec(job_id)))
        return _drive(runs, fence, _command(runs, job_id, file, on), told)


def _command(runs: RunStore, job_id: str, file: Path, on: str) -> list[str]:
    """What the attempt runs: a stage's command on the spec in `file`, or a program of the user's."""
    kind = runs.job(job_id).kind
    if kind == "command":
        return [str(word) for word in runs.spec(job_id)["argv"]]
    return [sys.executable, "-u", "-c", COMMAND, kind, str(file), "--on", on]


def _drive(runs: RunStore, fence: Fence, command: list[str], told: threading.Event) -> int:
    job_id, number = fence.job_id, fence.attempt
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, ENVIRONMENT: fence.dump()},
    )  # fmt: skip
    output = Output(runs.store, (*fence.folder, "logs"), fence.start, child)
    watch = Watch(runs, fence, runs.job(job_id).job(fence.root, {}).cluster)
    reason: StopReason | None = None
    ending_at, beat_at = 0.0, 0.0
    while child.poll() is None:
        now = time.monotonic()
        if now >= beat_at:
            _beat(runs, fence, watch, output)
            beat_at = now + HEARTBEAT_S
        if not ending_at and (told.is_set() or (reason := watch.reason()) is not None):
            child.send_signal(signal.SIGTERM)
            ending_at = now + GRACE_S.get(reason or "user", LIMIT_GRACE_S)
        if ending_at and now > ending_at:
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(LOOK_S)
    output.close()
    if reason == "superseded" or (told.is_set() and reason is None):
        return child.returncode  # another driver goes on, or the machine goes away: this is no end of the job
    runs.end(job_id, number, Ended(time.time(), child.returncode, reason, output.last_error()))
    return child.returncode


def _take_start(runs: RunStore, job_id: str, number: int) -> int:
    """The next free number of a start: with it this driver fences off all earlier ones of the attempt."""
    folder = ("jobs", job_id, f"a{number}", "starts")
    start = len(runs.store.list(*folder)) + 1
    facts = {"at": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    while not runs.store.create_bytes(json_bytes(facts), *folder, f"{start}.json"):
        start += 1
    return start


def _beat(runs: RunStore, fence: Fence, watch: Watch, output: Output) -> None:
    beat = Heartbeat(time.time(), fence.start, socket.gethostname(), os.getpid(), output.progress(), watch.usd())
    runs.store.write_json(beat.__dict__, *fence.folder, "heartbeat.json")
