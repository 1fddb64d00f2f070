"""A job on KubeRay from its submission to its end, as a person sees it."""

import time
from pathlib import Path

import pytest

from graftwork.cluster.targets import backend_of
from tests.k8s.cluster import KubeCluster
from tests.k8s.commands import command, ends_with
from tests.waiting import until

pytestmark = pytest.mark.k8s


def test_a_job_runs_to_its_end_and_its_log_and_status_outlive_its_object(kube_ray: KubeCluster, tmp_path: Path) -> None:
    job = command(tmp_path, "greet", "print('hello from afar')")
    backend = backend_of(kube_ray.on, job.root)
    assert backend.submit(job).attempt == 1
    status = backend.wait(job.job_id, 60)
    assert (status.state, status.exit_code) == ("succeeded", 0)
    assert "hello from afar" in "".join(backend.logs(job.job_id))
    kube_ray.clear()
    until(lambda: not kube_ray.job_names())
    assert backend.status(job.job_id).state == "succeeded"
    assert "hello from afar" in "".join(backend.logs(job.job_id))


def test_a_cancelled_job_leaves_no_object_and_no_process(kube_ray: KubeCluster, tmp_path: Path) -> None:
    job = command(tmp_path, "long", ends_with(tmp_path / "end"))
    backend = backend_of(kube_ray.on, job.root)
    backend.submit(job)
    until(lambda: backend.status(job.job_id).state == "running")
    began = time.monotonic()
    assert backend.cancel(job.job_id).state == "cancelled"
    assert time.monotonic() - began < 10
    assert kube_ray.job_names() == []
