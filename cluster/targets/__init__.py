"""Targets that run jobs, by the value of `--target`."""

from graftwork.cluster.jobs.backend import StoredBackend
from graftwork.cluster.jobs.models import JobBackend
from graftwork.cluster.ray_address import unknown_place
from graftwork.cluster.spec import ClusterSpec


def backend_of(on: str, root: str, cluster: ClusterSpec | None = None) -> JobBackend:
    """The backend of a place. Reaches nothing. Raises ConfigError for what is no place of jobs."""
    if on == "local":
        from graftwork.cluster.targets.local import LocalPlace

        return StoredBackend(LocalPlace(root), root)
    if on.startswith(("http://", "https://")):
        from graftwork.cluster.targets.ray_jobs import AddressPlace

        return StoredBackend(AddressPlace(on, root), root)
    if on.startswith("k8s:"):
        from graftwork.cluster.targets.kuberay import KubeRayPlace

        return StoredBackend(KubeRayPlace(on, root, cluster or ClusterSpec()), root)
    raise unknown_place(on)
