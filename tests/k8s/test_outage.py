"""The API server goes away for a while, and the head for good: what a person sees of the jobs meanwhile and after."""

import threading
import time
from pathlib import Path

import pytest

from graftwork.cluster.places import backend_of
from tests.k8s.cluster import KubeCluster
from tests.k8s.commands import command, until

pytestmark = pytest.mark.k8s
AWAY_S = 20.0
LOST_S = 30.0


def test_wait_and_logs_outlast_a_server_that_is_gone_for_twenty_seconds(kube: KubeCluster, tmp_path: Path) -> None:
    job = command(tmp_path, "patient", until(tmp_path / "end"))
    backend = backend_of(kube.on, job.root)
    backend.submit(job)
    while backend.status(job.job_id).state != "running":
        time.sleep(0.1)
    outcome: dict[str, object] = {}
    followers = [
        threading.Thread(target=lambda: outcome.update(wait=backend_of(kube.on, job.root).wait(job.job_id, 120))),
        threading.Thread(
            target=lambda: outcome.update(logs="".join(backend_of(kube.on, job.root).logs(job.job_id, follow=True)))
        ),
    ]
    for follower in followers:
        follower.start()
    kube.server.kill()
    gone_at = time.monotonic()
    status = backend.status(job.job_id)
    assert status.state == "running", "the store knows"
    (tmp_path / "end").touch()
    time.sleep(max(0.0, AWAY_S - (time.monotonic() - gone_at)))  # as long as the outage is to last
    kube.server.back()
    for follower in followers:
        follower.join(60)
    assert getattr(outcome["wait"], "state") == "succeeded"  # noqa: B009
    assert "done" in str(outcome["logs"])
    kube.clear()


def test_a_job_whose_head_was_killed_is_lost_within_half_a_minute(kube: KubeCluster, tmp_path: Path) -> None:
    job = command(tmp_path, "orphan", until(tmp_path / "end"))
    backend = backend_of(kube.on, job.root)
    backend.submit(job)
    while backend.status(job.job_id).state != "running":
        time.sleep(0.1)
    kube.head.kill()
    killed_at = time.monotonic()
    try:
        while (status := backend.status(job.job_id)).state != "lost":
            assert time.monotonic() - killed_at < LOST_S, status
            time.sleep(0.2)
        assert "last heard" in status.why
        assert backend.cancel(job.job_id).ended
        assert kube.job_names() == []
    finally:
        kube.head.remove()
        kube.head.start()
