"""Objects of KubeRay's as this package makes them: `python k8s/examples/render.py` writes *.yaml. A test compares.

The spec of each cluster is examples/clusters/<name>.yaml; the job is a made-up one with a fixed digest, so that the
files change with the builder alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from graftwork.cluster.jobs.models import Attempt, Demand, Job
from graftwork.cluster.kuberay.objects import build_rayjob, service_objects
from graftwork.cluster.kuberay.preflight import machines_of
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import load
from graftwork.planning.hardware import with_gpus

FOLDER = Path(__file__).parent
CLUSTERS = FOLDER.parents[1] / "examples" / "clusters"
NAMESPACE = "graftwork"
DIGEST = "0123456789" + "0" * 54
WHEEL = "wheels/graftwork-0.1.0+000000000000-py3-none-any.whl"
SERVED = CLUSTERS.parent / "serve.yaml"
TOKEN_ENV, TOKEN = "GRAFTWORK_TOKEN", "graftwork-endpoint/tokens"


def rendered() -> Iterator[tuple[str, str]]:
    """File name and text of each example."""
    for path in sorted(CLUSTERS.glob("*.yaml")):
        yield f"train-{path.name}", text(path, [rayjob(path)])
    gpus = CLUSTERS / "gpu.yaml"
    yield "serve-gpu.yaml", text(gpus, service(gpus))


def rayjob(path: Path) -> dict[str, Any]:
    """The RayJob of a training on a cluster."""
    job = a_job(path, "train")
    return build_rayjob(Attempt(job, 1), NAMESPACE, f"{job.root}/{WHEEL}")


def service(path: Path) -> list[dict[str, Any]]:
    """The RayService of an endpoint that grows to as many machines as the cluster has, and its disruption budget."""
    job = a_job(path, "serve", grows=True)
    return service_objects(job, NAMESPACE, f"{job.root}/{WHEEL}")


def a_job(path: Path, kind: str, *, grows: bool = False) -> Job:
    """A job on the cluster of a file."""
    cluster = load(path, expect="cluster")
    assert isinstance(cluster, ClusterSpec)
    spec: dict[str, Any] = {}
    if grows:
        groups = [group.model_copy(update={"count": 2, "max_count": group.count}) for group in cluster.workers]
        secrets = {**cluster.secret_env, TOKEN_ENV: TOKEN}
        cluster = cluster.model_copy(update={"workers": tuple(groups), "secret_env": secrets})
        named = {"name": "airport-card", "token_env": TOKEN_ENV, "root": cluster.storage.uri, "num_replicas": 2}
        served, _ = with_gpus(load(SERVED, expect="serve").with_(named), machines_of(cluster).accelerators)
        spec = served.model_dump(mode="json")
    gpus = 1.0 if machines_of(cluster).gpus else 0.0
    demand = Demand(sum(group.count for group in cluster.workers), 1.0, gpus)
    return Job("airport-card", kind, DIGEST, cluster.storage.uri or "", spec, cluster, demand)


def text(path: Path, objects: list[dict[str, Any]]) -> str:
    """Objects as YAML, with a word on where they are from."""
    said = f"# Made by k8s/examples/render.py from examples/clusters/{path.name}: change that, and run it again.\n"
    return said + yaml.safe_dump_all([dict(made) for made in objects], sort_keys=False, width=120)


def write(files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write(dict(rendered()))
