"""Targets that run jobs, by the value of `--target`, and a target that does not answer."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from graftwork.cluster.jobs.backend import StoredBackend
from graftwork.cluster.jobs.models import Attempt, Finding, Job, JobBackend, JobTarget, ObservedState, TargetMachines
from graftwork.cluster.session import unknown_place
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import ClusterError


def backend_of(on: str, root: str, cluster: ClusterSpec | None = None) -> JobBackend:
    """Return the backend of a target, without a connection. Raises ConfigError for a value that names no target."""
    if on == "local":
        from graftwork.cluster.targets.local import LocalTarget

        return StoredBackend(LocalTarget(root), root)
    if on.startswith(("http://", "https://")):
        from graftwork.cluster.targets.ray_jobs import RayJobsTarget

        return StoredBackend(RayJobsTarget(on, root), root)
    if on.startswith("k8s:"):
        from graftwork.cluster.targets.kuberay import KubeRayTarget

        return StoredBackend(KubeRayTarget(on, root, cluster or ClusterSpec()), root)
    raise unknown_place(on)


class UnreachableTarget:
    """Reports every attempt without a state, so that heartbeats and ends in the store decide it."""

    def __init__(self, on: str, error: ClusterError, known: JobTarget | None = None) -> None:
        """`known` builds the objects, which needs no answer."""
        self.on, self._error, self._known = on, error, known

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """Return all of them, without a state."""
        return {name: ObservedState(message=f"{self.on} does not answer") for name in attempt_ids}

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """Raises the ClusterError of the target."""
        self._raise()

    def check(self, job: Job) -> list[Finding]:
        """Return no findings: nothing can be checked."""
        return []

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Return the objects that the target itself would make."""
        return self._known.objects(attempt) if self._known is not None else []

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Return nothing: the present objects are not known."""
        return []

    def start(self, attempt: Attempt) -> None:
        """Raises the ClusterError of the target, as do `stop` and `doctor`."""
        self._raise()

    def stop(self, attempt_id: str) -> None:
        """Raises."""
        self._raise()

    def doctor(self) -> list[Finding]:
        """Raises."""
        self._raise()

    def _raise(self) -> NoReturn:
        raise self._error
