"""A place that runs jobs, as the conformance suite needs it: its backend, how to break it, what is left of a job."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from graftwork.cluster.jobs.backend import StoredBackend
from graftwork.cluster.jobs.fencing import ENVIRONMENT
from graftwork.cluster.jobs.models import Attempt, Demand, ExecSpec, Job, JobStatus
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets import backend_of
from tests.waiting import until

STARTS_S = 60.0
"""How long a driver may take to its first word on a machine that does other things as well."""
POLL_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Ground:
    """What the tests of a place share: where it is, and how to take it away."""

    on: str
    cluster: ClusterSpec
    hold: Callable[[Attempt], contextlib.AbstractContextManager[None]]
    """Have an attempt that the store knows wait in its place, so that its driver does not start meanwhile."""
    gone: Callable[[], None] | None = None
    """Nobody reaches it any more. None for a place that is never away."""
    back: Callable[[], None] = lambda: None
    secrets: Mapping[str, str] = field(default_factory=dict)
    """What clients know and nothing may show, by its name."""


def timeless(status: JobStatus) -> JobStatus:
    """Without the times that are told by the age of a file, which differ by milliseconds from one look to the next."""
    return replace(status, submitted_at=None, started_at=None)


@dataclass(frozen=True)
class Here:
    """A place with an empty store of its own."""

    ground: Ground
    root: Path

    @property
    def backend(self) -> StoredBackend:
        """A new client."""
        return self.at(self.root)

    @property
    def runs(self) -> JobStore:
        return JobStore(str(self.root))

    def at(self, root: Path) -> StoredBackend:
        """A client with another store."""
        backend = backend_of(self.ground.on, str(root), self.ground.cluster)
        assert isinstance(backend, StoredBackend)
        return backend

    def job(
        self, *argv: str, name: str = "try", root: Path | None = None, demand: Demand | None = None, **cluster: Any
    ) -> Job:
        """A program as a job. `cluster`: changed fields of the place's."""
        spec = ExecSpec(name=name, root=str(root or self.root), argv=argv)
        there = ClusterSpec.model_validate({**self.ground.cluster.model_dump(), **cluster})
        dump = spec.model_dump(mode="json")
        return Job(name, "exec", spec.identity(), spec.root, dump, there, demand or Demand())

    def python(self, program: str, *argv: str, **more: Any) -> Job:
        """`python -u -c PROGRAM ARGV` as a job. The program may call `at_work()`, which prints so and marks it."""
        mark = self._marks / f"{more.get('name', 'try')}-at-work"
        at_work = f"def at_work():\n    print('at work')\n    open({str(mark)!r}, 'w').close()\n"
        return self.job(sys.executable, "-u", "-c", at_work + program, *argv, **more)

    def waiting(self, **more: Any) -> Job:
        """A job that says `at work` and ends well once `let_go` is called."""
        program = f"""
import os, time
at_work()
while not os.path.exists({str(self._gate)!r}):
    time.sleep(0.02)
print("done")
"""
        return self.python(program, **more)

    def let_go(self) -> None:
        self._gate.touch()

    def start(self, job: Job, says: str = "") -> JobStatus:
        """Submit it; returns once its driver is heard, its command is `at_work()`, and the log says so."""
        mark = self._marks / f"{job.name}-at-work"
        self.backend.submit(job)
        return self.until(
            job.job_id,
            lambda status: status.heartbeat_at is not None and mark.exists() and says in self.log(job.job_id),
        )

    def run(self, job: Job) -> JobStatus:
        """Submit it; its end."""
        self.backend.submit(job)
        return self.end(job.job_id)

    def end(self, job_id: str) -> JobStatus:
        return self.until(job_id, lambda status: status.ended)

    def until(self, job_id: str, holds: Callable[[JobStatus], bool], within_s: float = STARTS_S) -> JobStatus:
        backend, end = self.backend, time.monotonic() + within_s
        while not holds(status := backend.status(job_id)):
            assert time.monotonic() < end, status
            time.sleep(POLL_INTERVAL_S)
        return status

    def log(self, job_id: str) -> str:
        return "".join(self.backend.logs(job_id))

    def lose_driver(self, job_id: str) -> None:
        """kill -9 of the process that speaks for the job."""
        beat = self.runs.attempt(job_id, self.runs.attempts(job_id)[-1]).heartbeat
        assert beat is not None
        os.kill(beat.pid, signal.SIGKILL)

    def processes(self, job_id: str) -> list[psutil.Process]:
        """All processes of this machine that work for a job: the driver, its command, and all below."""
        return [process for process in psutil.process_iter() if self._works_for(process, job_id)]

    def nothing_left(self, job_id: str, within_s: float = 30.0) -> None:
        """Within the time no process of it is left."""
        until(
            lambda: not self.processes(job_id),
            lambda: [process.as_dict(["pid", "cmdline", "status"]) for process in self.processes(job_id)],
            within_s=within_s,
        )

    def everything(self) -> bytes:
        """All that the store holds, names included."""
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return b"\n".join(str(path).encode() + b"\n" + path.read_bytes() for path in files)

    @property
    def _marks(self) -> Path:
        return self.root.parent

    @property
    def _gate(self) -> Path:
        return self._marks / "gate"

    def _works_for(self, process: psutil.Process, job_id: str) -> bool:
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                return False
            mark = process.environ().get(ENVIRONMENT)
            fence = json.loads(mark) if mark else {}
            if (fence.get("root"), fence.get("job_id")) == (str(self.root), job_id):
                return True
            words = process.cmdline()
            return "python" in words[0] and str(self.root) in words and job_id in words if words else False
        return False
