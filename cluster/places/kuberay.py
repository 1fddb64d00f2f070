"""KubeRay as a place: an attempt is a RayJob object."""

from collections.abc import Collection, Mapping
from typing import Any

from graftwork.cluster.backend import Attempt, Finding, Job
from graftwork.cluster.place import Seen
from graftwork.cluster.spec import ClusterSpec


class KubeRayPlace:
    """`on` is k8s:CONTEXT/NAMESPACE of the kubeconfig."""

    def __init__(self, on: str, root: str, cluster: ClusterSpec) -> None:
        self.on, self._root, self._cluster = on, root, cluster

    def check(self, job: Job) -> list[Finding]:
        raise NotImplementedError

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        raise NotImplementedError

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        raise NotImplementedError

    def doctor(self) -> list[Finding]:
        """Nothing is looked at yet."""
        return []

    def start(self, attempt: Attempt) -> None:
        raise NotImplementedError

    def observe(self, attempt_ids: Collection[str]) -> dict[str, Seen]:
        raise NotImplementedError

    def stop(self, attempt_id: str) -> None:
        raise NotImplementedError
