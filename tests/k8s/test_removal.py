"""The end of a job whose pods take their time: cancel and resubmit wait for the grace that the objects give them."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.cluster.kuberay.client import MARGIN_S
from graftwork.cluster.spec import ClusterSpec, GcsSpec
from graftwork.cluster.targets import backend_of
from graftwork.errors import ClusterError
from graftwork.storage.store import RunPaths, Store
from graftwork.tuning.remote_trial import KIND, Elsewhere, end_trials
from tests.k8s.cluster import JOBS, KubeCluster, kube_cluster
from tests.k8s.commands import CLUSTER, command, ends_with
from tests.k8s.fake_operator import FOLDER
from tests.waiting import until

pytestmark = pytest.mark.k8s
PODS_END_S, CLEANUP_S = 13.0, 4.0
"""Above the 10 s that were once all that a deletion was given."""
MERGE = "application/merge-patch+json"


@pytest.fixture(scope="module")
def kube() -> Iterator[KubeCluster]:
    with kube_cluster(ray=False) as one:
        yield one


@pytest.fixture
def slow(kube: KubeCluster) -> Iterator[KubeCluster]:
    """Its pods end slowly, as with a checkpoint in their preStop hook. Each test finds it empty."""
    kube.fake_operator.pods_end_s, kube.fake_operator.cleanup_s = PODS_END_S, CLEANUP_S
    yield kube
    kube.fake_operator.pods_end_s = kube.fake_operator.cleanup_s = 0.0
    kube.clear()
    until(lambda: not kube.job_names() and not clusters(kube))


def clusters(kube: KubeCluster) -> list[str]:
    code, found = kube.server.ask("GET", f"{FOLDER}/rayclusters")
    assert code == 200, found
    return [one["metadata"]["name"] for one in found["items"]]


@pytest.mark.parametrize("redis", [False, True])
def test_a_cancellation_waits_for_the_pods(
    slow: KubeCluster, tmp_path: Path, redis: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    job = command(tmp_path, "redis" if redis else "plain", ends_with(tmp_path / "never"), spec_of(redis))
    backend = backend_of(slow.on, job.root)
    backend.submit(job)
    until(lambda: clusters(slow))
    began = time.monotonic()
    assert backend.cancel(job.job_id).state == "cancelled"
    took = time.monotonic() - began
    assert took >= PODS_END_S - 1 + (CLEANUP_S if redis else 0.0), "the server's time stamps have whole seconds"
    assert slow.job_names() == clusters(slow) == []
    said = capfd.readouterr().err
    limit = 120 + MARGIN_S + (300 if redis else 0)
    assert re.search(rf"delete RayJob {job.job_id}-a1: \d+ s of at most {limit} s: finalizers: ", said), said
    assert backend.resubmit(job.job_id).attempt == 2
    until(lambda: clusters(slow))


def test_the_trials_of_a_sweep_end_together(slow: KubeCluster, tmp_path: Path) -> None:
    sweep = RunPaths(Store(str(tmp_path)), "sweep", "ab" * 32)
    backend = backend_of(slow.on, str(tmp_path))
    for number in range(3):
        job = command(tmp_path, f"{sweep.run_id}-{number}", ends_with(tmp_path / "never"))
        backend.submit(replace(job, kind=KIND))
    until(lambda: len(clusters(slow)) == 3)
    began = time.monotonic()
    assert end_trials(Elsewhere(slow.on, CLUSTER.model_dump(mode="json")), sweep) == 3
    assert PODS_END_S - 1 <= time.monotonic() - began < 2 * PODS_END_S
    assert slow.job_names() == []


def test_a_removal_that_does_not_end_names_what_holds_it(slow: KubeCluster, tmp_path: Path) -> None:
    job = command(tmp_path, "held", ends_with(tmp_path / "never"))
    backend = backend_of(slow.on, job.root)
    backend.submit(job)
    until(lambda: clusters(slow))
    path = f"{JOBS}/{job.job_id}-a1"
    part = slow.server.ask("GET", path)[1]["spec"]["rayClusterSpec"]
    for group in (part["headGroupSpec"], *part["workerGroupSpecs"]):
        group["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    change = {
        "metadata": {"finalizers": ["ray.io/rayjob-finalizer", "example.com/audit"]},
        "spec": {"rayClusterSpec": part},
    }
    assert slow.server.ask("PATCH", path, change, MERGE)[0] == 200
    began = time.monotonic()
    with pytest.raises(ClusterError, match=rf"still there after {1 + MARGIN_S} s: finalizers: example.com/audit"):
        backend.cancel(job.job_id)
    assert 1 + MARGIN_S <= time.monotonic() - began < 2 * MARGIN_S, "the grace is that of the object"
    slow.server.ask("PATCH", path, {"metadata": {"finalizers": []}}, MERGE)
    assert backend.cancel(job.job_id).state == "cancelled"


def spec_of(redis: bool) -> ClusterSpec:
    gcs = GcsSpec(backend="redis", redis_address="redis:6379", redis_secret="redis")
    return CLUSTER.model_copy(update={"gcs": gcs}) if redis else CLUSTER
