"""An existing Ray as a place, by its Jobs API: the driver is the job, on the head."""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from graftwork.cluster.address import JOB
from graftwork.cluster.backend import Attempt, Finding, Job
from graftwork.cluster.jobs_api import ENDED, JobsApi
from graftwork.cluster.place import ObservedState
from graftwork.cluster.places.address_check import fit, health, machines_of, nodes_of
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.target_machines import TargetMachines
from graftwork.cluster.wheel import build_wheel
from graftwork.errors import ClusterError
from graftwork.storage import Store

STOP_S = 8.0
STARTS_S = 1.0
"""A pending job that is asked to end may be about to start, and then ends by itself."""
DROP_S = 20.0
DROP = "-drop"
"""Ends the id of the job that ends another one; such jobs are forgotten at once."""
POLL_INTERVAL_S = 0.2


class AddressPlace:
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
        entrypoint = f"python -m graftwork.cluster.driver {self._root} {attempt.job.job_id} {attempt.number} {JOB}"
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
                    f"cancel {attempt_id} at {self.on}", f"Ray did not stop it within {STOP_S:.0f} s",
                    "its driver is told to end, and killed after 3 s",
                    "look at the dashboard; a head without memory answers and does nothing",
                )  # fmt: skip

    def name(self, attempt_id: str) -> str:
        """Of the attempt in Ray: the same job of another store is another one there."""
        return f"{attempt_id}-{hashlib.sha256(self._root.encode()).hexdigest()[:8]}"

    def _drop(self, jobs: JobsApi, pending: str) -> None:
        dropping = f"{pending}{DROP}"
        entrypoint = f"python -m graftwork.cluster.places.drop {pending}"
        jobs.submit(entrypoint, build_wheel()[1], dropping)
        if not _within(DROP_S, lambda: _ended(jobs, pending)):
            raise ClusterError(
                f"cancel {pending} at {self.on}", f"it is pending, and did not go within {DROP_S:.0f} s",
                "its driver ends at once should it ever start", "look at the dashboard: the head takes no jobs",
            )  # fmt: skip
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
