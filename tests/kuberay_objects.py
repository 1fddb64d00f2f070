"""Specs and jobs for the tests of KubeRay's objects."""

import json
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.jobs.models import Attempt, Demand, Job
from graftwork.cluster.kuberay.objects import build_rayjob, build_rayservice
from graftwork.cluster.spec import ClusterSpec
from graftwork.serving.spec import ServeSpec

IMAGE = "registry.example/graftwork@sha256:" + "0" * 63 + "1"
ROOT = "s3://bucket/team-a"
BASE: dict[str, Any] = {
    "image": IMAGE,
    "storage": {"uri": ROOT, "secret": "s3-credentials"},
    "limits": {"deadline": "12h"},
}
GPUS: dict[str, Any] = {
    "name": "gpu",
    "count": 2,
    "gpu": 1,
    "gpu_type": "H100",
    "node_selector": {"example.com/gpu": "h100"},
}


SERVE = ServeSpec.model_validate({"name": "airport", "base": "b", "root": ROOT, "token_env": "KEYS"})


def cluster(**changes: Any) -> ClusterSpec:
    return ClusterSpec.model_validate({**BASE, **changes})


def job(spec: ClusterSpec, *, kind: str = "train", name: str = "airport", demand: Demand | None = None) -> Job:
    stage = SERVE.with_({"name": name}).model_dump(mode="json") if kind == "serve" else {"name": name}
    return Job(name, kind, "ab" * 32, spec.storage.uri or "", stage, spec, demand or Demand())


def attempt(spec: ClusterSpec, **parts: Any) -> Attempt:
    return Attempt(job(spec, **parts), 1)


GONE: Any = object()
"""As a value in `changed`: the field is taken out."""


def rayjob(**changes: Any) -> dict[str, Any]:
    return build_rayjob(attempt(cluster(**changes)), "team-a", f"{ROOT}/wheels/graftwork.whl")


def rayservice(**changes: Any) -> dict[str, Any]:
    config = {"applications": [{"name": "graftwork", "import_path": "graftwork.serving.deploy:build"}]}
    return build_rayservice(job(cluster(**changes), kind="serve"), "team-a", config)


def raycluster(**changes: Any) -> dict[str, Any]:
    """The cluster that KubeRay makes of a RayJob, as an object of its own."""
    spec = rayjob(**changes)["spec"]["rayClusterSpec"]
    metadata = {"name": "session", "namespace": "team-a"}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}


def changed(made: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with values at dotted paths, list indices among them, replaced. `|` parts keys with dots."""
    copy: dict[str, Any] = json.loads(json.dumps(made))
    for path, given in changes.items():
        value = given if given is GONE else json.loads(json.dumps(given))
        *way, last = path.split("|" if "|" in path else ".")
        inner: Any = copy
        for step in way:
            inner = inner[int(step)] if isinstance(inner, list) else inner.setdefault(step, {})
        if value is GONE:
            del inner[last]
        elif isinstance(inner, list):
            inner[int(last)] = value
        else:
            inner[last] = value
    return copy
