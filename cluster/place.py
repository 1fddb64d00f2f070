"""What a place alone knows of jobs: whether an attempt is there, how to start it, how to be rid of it.

`StoredBackend` (cluster/stored.py) makes a whole `JobBackend` of it: submission, fencing, status, logs: written once.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from graftwork.cluster.backend import Attempt, Finding, Job
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.target_machines import TargetMachines


@dataclass(frozen=True)
class ObservedState:
    """An attempt as its place shows it, in KubeRay's words (RayJob's status); other places use `job_status` alone."""

    job_status: str = ""
    """Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED; empty before Ray has it."""
    deployment_status: str = ""
    """KubeRay's: Initializing, Running, Complete, Failed, ValidationFailed, Suspending, Suspended, Retrying or
    Waiting."""
    reason: str = ""
    """KubeRay's, e.g. DeadlineExceeded, AppFailed."""
    message: str = ""


class JobTarget(Protocol):
    """Each call raises ClusterError when the place is out of reach or refuses us, within some 10 s."""

    on: str

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """The machines that workers of a job may get here; `cluster` describes those that are made for a job."""

    def check(self, job: Job) -> list[Finding]:
        """What would keep the job from running here. Writes nothing that stays."""

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """The objects that `start` would make; empty where a place has none."""

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Those of them that are there, without what the server adds; for the diff."""

    def start(self, attempt: Attempt) -> None:
        """Have the attempt's driver run here: get-or-create by `attempt.id`, at any number of callers at once."""

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """What it shows of them, those it does not know left out. One round trip for all, however many."""

    def stop(self, attempt_id: str) -> None:
        """Nothing of it is left at return; no-op where it is not there. The driver was asked to end before."""

    def doctor(self) -> list[Finding]:
        """What is wrong with the place itself, whatever the job; each finding says how to mend it. Writes nothing."""
