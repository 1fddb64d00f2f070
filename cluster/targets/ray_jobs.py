"""Ray cluster as a target, through its Jobs API: the driver is the job, on the head.

`run_command` runs a command that is no job, e.g. the demo, and prints its output here.
"""

import contextlib
import hashlib
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.cluster.jobs.models import Attempt, Finding, Job, ObservedState, TargetMachines
from graftwork.cluster.jobs.packaging import build_wheel, relative, shipped, zipped
from graftwork.cluster.ray_address import JOB, without_target
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets.ray_jobs_api import ENDED, JobsApi, exit_code
from graftwork.cluster.targets.ray_jobs_checks import fit, health, machines_of, nodes_of
from graftwork.errors import ClusterError, Interrupted
from graftwork.storage.store import Store

# Commands that are no jobs (demo): they run on an existing Ray through its Jobs API.


ENTRYPOINT = "python -c 'from graftwork.cli import main; main()'"


def run_command(on: str, argv: Sequence[str]) -> int:
    """Run `graftwork ARGV` on the Ray at `on`, print what it prints, return its exit code.

    Files that the arguments name are shipped; data and root must be reachable from the cluster (s3:// or a shared
    folder). Ctrl-C ends the job there, and what it committed stays valid. Raises ClusterError, Interrupted, RunError.
    """
    files = [Path(argument) for argument in argv if Path(argument).is_file()]
    named = [str(relative(Path(a))) if Path(a).is_file() else a for a in without_target(argv)]
    job_id = f"graftwork-{secrets.token_hex(6)}"
    with JobsApi(on) as jobs:
        with shipped(files) as folder:
            package = zipped(
                {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            )
        jobs.submit(f"{ENTRYPOINT} {shlex.join(_inside(named))}", package, job_id)
        print(f"job {job_id} at {jobs.on}", file=sys.stderr)
        try:
            for text in jobs.logs(job_id):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            with contextlib.suppress(ClusterError):
                jobs.stop(job_id)
            raise Interrupted(
                f"job {job_id}",
                f"stopped at {on} by Ctrl-C",
                "what was committed stays valid",
                "run the same command: it continues from there",
            ) from None
        return exit_code(jobs.status(job_id), job_id)


def _inside(argv: Sequence[str]) -> list[str]:
    """The command on the Ray that runs the job. Verbs without `--target` start no Ray, so they are left as they are."""
    verbs = ("train", "tune", "serve", "compare", "quantize", "chat", "demo")
    return [*argv, "--target", JOB] if argv and argv[0] in verbs else list(argv)


# The target.


STOP_S = 8.0
STARTS_S = 1.0
"""A pending job that is asked to end may be about to start, and then ends by itself."""
DROP_S = 20.0
DROP = "-drop"
"""Ends the id of the job that ends another one; such jobs are forgotten at once."""
POLL_INTERVAL_S = 0.2


class RayJobsTarget:
    """Reached anew for each call, with the token of the environment."""

    def __init__(self, on: str, root: str) -> None:
        self.on, self._root = on.rstrip("/"), Store(root).uri

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """The nodes that are alive now."""
        with JobsApi(self.on) as jobs:
            return machines_of(self.on, nodes_of(jobs))

    def check(self, job: Job) -> list[Finding]:
        """That it answers and takes us, has what the workers ask for, and reaches what the job names."""
        with JobsApi(self.on) as jobs:
            return fit(job, self._root, jobs)

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """None."""
        return []

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """None."""
        return []

    def doctor(self) -> list[Finding]:
        """Who may use it, its clock, its version, its agents and nodes."""
        with JobsApi(self.on) as jobs:
            return health(self._root, jobs)

    def start(self, attempt: Attempt) -> None:
        """Send the wheel as the job's folder and start the driver. `check` saw to it that a shell changes nothing."""
        entrypoint = f"python -m graftwork.cluster.jobs.driver {self._root} {attempt.job.job_id} {attempt.number} {JOB}"
        with JobsApi(self.on) as jobs:
            jobs.submit(entrypoint, build_wheel()[1], self.name(attempt.id))

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """One listing for all."""
        with JobsApi(self.on) as jobs:
            found = {job.submission_id: job for job in jobs.list()}
        names = {attempt_id: found.get(self.name(attempt_id)) for attempt_id in attempt_ids}
        return {attempt_id: ObservedState(job.status, message=job.message) for attempt_id, job in names.items() if job}

    def stop(self, attempt_id: str) -> None:
        """Stop the job and see that it has stopped; one that never started is taken out of Ray, with its record."""
        name = self.name(attempt_id)
        with JobsApi(self.on) as jobs:
            seen = jobs.status(name)
            if seen is None or seen.status in ENDED:
                return
            jobs.stop(name)
            if seen.status == "PENDING" and not _within(STARTS_S, lambda: _left(jobs, name, "PENDING")):
                self._drop(jobs, name)
            elif not _within(STOP_S, lambda: _ended(jobs, name)):
                raise ClusterError(
                    f"cancel {attempt_id} at {self.on}",
                    f"Ray did not stop it within {STOP_S:.0f} s",
                    "its driver is told to end, and killed after 3 s",
                    "look at the dashboard; a head without memory answers and does nothing",
                )

    def name(self, attempt_id: str) -> str:
        """Of the attempt in Ray: the same job of another store is another one there."""
        return f"{attempt_id}-{hashlib.sha256(self._root.encode()).hexdigest()[:8]}"

    def _drop(self, jobs: JobsApi, pending: str) -> None:
        dropping = f"{pending}{DROP}"
        entrypoint = f"python -m graftwork.cluster.targets.ray_jobs {pending}"
        jobs.submit(entrypoint, build_wheel()[1], dropping)
        if not _within(DROP_S, lambda: _ended(jobs, pending)):
            raise ClusterError(
                f"cancel {pending} at {self.on}",
                f"it is pending, and did not go within {DROP_S:.0f} s",
                "its driver ends at once should it ever start",
                "look at the dashboard: the head takes no jobs",
            )
        for name in (pending, dropping):
            if _within(STOP_S, lambda: _ended(jobs, name)):  # noqa: B023  # called at once
                jobs.delete(name)


def _within(timeout_s: float, done: Callable[[], bool]) -> bool:
    end = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def _ended(jobs: JobsApi, name: str) -> bool:
    job = jobs.status(name)
    return job is None or job.status in ENDED


def _left(jobs: JobsApi, name: str, status: str) -> bool:
    job = jobs.status(name)
    return job is None or job.status != status


# `python -m graftwork.cluster.targets.ray_jobs SUBMISSION_ID` on a Ray: end the supervisor of a job that never started.
#
# The Jobs API says True to a stop of a pending job and does nothing (ray#58353); it would start whenever it can. Its
# supervisor is a named actor, which only somebody inside can kill; the API then shows the job as FAILED.


NAMESPACE = "SUPERVISOR_ACTOR_RAY_NAMESPACE"
NAME = "_ray_internal_job_actor_{}"
"""As of Ray 2.60, dashboard/modules/job/common.py and ray_constants.py."""


if __name__ == "__main__":
    import ray

    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    with contextlib.suppress(ValueError):  # it has ended by itself
        ray.kill(ray.get_actor(NAME.format(sys.argv[1])), no_restart=True)
