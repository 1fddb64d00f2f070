"""Specs and jobs for the tests of KubeRay's objects."""

from typing import Any

from graftwork.cluster.backend import Attempt, Demand, Job
from graftwork.cluster.spec import ClusterSpec

IMAGE = "registry.example/graftwork@sha256:" + "0" * 63 + "1"
ROOT = "s3://bucket/team-a"
BASE: dict[str, Any] = {
    "image": IMAGE,
    "storage": {"uri": ROOT, "secret": "s3-credentials"},
    "limits": {"deadline": "12h"},
}
GPUS: dict[str, Any] = {
    "name": "gpu", "count": 2, "gpu": 1, "gpu_type": "H100", "node_selector": {"example.com/gpu": "h100"},
}  # fmt: skip


def cluster(**changes: Any) -> ClusterSpec:
    return ClusterSpec.model_validate({**BASE, **changes})


def job(spec: ClusterSpec, *, kind: str = "train", name: str = "airport", demand: Demand | None = None) -> Job:
    return Job(name, kind, "ab" * 32, spec.storage.uri or "", {"name": name}, spec, demand or Demand())


def attempt(spec: ClusterSpec, **parts: Any) -> Attempt:
    return Attempt(job(spec, **parts), 1)
