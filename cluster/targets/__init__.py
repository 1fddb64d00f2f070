"""Targets that run jobs, by the value of `--target`."""

from graftwork.cluster.jobs.backend import StoredBackend
from graftwork.cluster.jobs.models import JobBackend
from graftwork.cluster.session import unknown_place
from graftwork.cluster.spec import ClusterSpec


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
