"""The API server goes away for a while, and the head for good: what a person sees of the jobs meanwhile and after."""

import threading
import time
from pathlib import Path

import pytest

from graftwork.cluster.targets import backend_of
from tests.k8s.cluster import KubeCluster
from tests.k8s.commands import command, ends_with
from tests.waiting import until

pytestmark = pytest.mark.k8s
AWAY_S = 20.0
LOST_S = 30.0


def test_wait_and_logs_outlast_a_server_that_is_gone_for_twenty_seconds(kube_ray: KubeCluster, tmp_path: Path) -> None:
    job = command(tmp_path, "patient", ends_with(tmp_path / "end"))
    backend = backend_of(kube_ray.on, job.root)
    backend.submit(job)
    until(lambda: backend.status(job.job_id).state == "running")
    outcome: dict[str, object] = {}
    watcher = backend_of(kube_ray.on, job.root)
    followers = [
        threading.Thread(target=lambda: outcome.update(wait=watcher.wait(job.job_id, 120).state)),
        threading.Thread(target=lambda: outcome.update(logs="".join(watcher.logs(job.job_id, follow=True)))),
    ]
    for follower in followers:
        follower.start()
    kube_ray.server.kill()
    gone_at = time.monotonic()
    status = backend.status(job.job_id)
    assert status.state == "running", "the store knows"
    (tmp_path / "end").touch()
    time.sleep(max(0.0, AWAY_S - (time.monotonic() - gone_at)))  # as long as the outage is to last
    kube_ray.server.back()
    for follower in followers:
        follower.join(60)
    assert outcome["wait"] == "succeeded"
    assert "done" in str(outcome["logs"])
    kube_ray.clear()


def test_a_job_whose_head_was_killed_is_lost_within_half_a_minute(kube_ray: KubeCluster, tmp_path: Path) -> None:
    job = command(tmp_path, "orphan", ends_with(tmp_path / "end"))
    backend = backend_of(kube_ray.on, job.root)
    backend.submit(job)
    until(lambda: backend.status(job.job_id).state == "running")
    kube_ray.head.kill()
    killed_at = time.monotonic()
    try:
        while (status := backend.status(job.job_id)).state != "lost":
            assert time.monotonic() - killed_at < LOST_S, status
            time.sleep(0.2)
        assert "last heard" in status.why
        assert backend.cancel(job.job_id).ended
        assert kube_ray.job_names() == []
    finally:
        kube_ray.head.remove()  # the next test that needs one starts one
