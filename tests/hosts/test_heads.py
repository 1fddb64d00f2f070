"""Heads of docs/ray-cluster.md: jobs and strangers, a kill, the return with jobs and workers."""

import contextlib
import json
import time
from typing import Any

import httpx
import psutil
import pytest

from tests.hosts.nodes import GRPC, RayCluster, graftwork, port_table, ray_cluster
from tests.hosts.port_scan import calls
from tests.waiting import until

TRUE_WITHIN_S = 30.0


def asked(cluster: RayCluster, path: str) -> Any:
    """What the dashboard answers to who has the token."""
    token = cluster.token_file.read_text()
    return httpx.get(f"{cluster.on}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=20).json()


def alive(cluster: RayCluster) -> int:
    """Nodes that the head knows to live."""
    with contextlib.suppress(httpx.HTTPError, ValueError):
        nodes = asked(cluster, "/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)
    return 0


def submitted(cluster: RayCluster, name: str, *argv: str) -> str:
    """Start a program as a job; its id."""
    spec = cluster.folder / f"{name}.yaml"
    spec.write_text(json.dumps({"kind": "exec", "name": name, "root": str(cluster.folder), "argv": argv}))
    sent = graftwork(cluster, "exec", str(spec), "--target", cluster.on, "--detach", "--json")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    return next(path.name for path in (cluster.folder / "jobs").iterdir() if path.name.startswith(f"{name}-"))


def state(cluster: RayCluster, job_id: str) -> str:
    said = graftwork(cluster, "jobs", "status", job_id, "--root", str(cluster.folder), "--json")
    return str(json.loads(said.stdout)["state"])


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_killed_head_comes_back_with_its_jobs_and_its_workers() -> None:
    with ray_cluster(keeps=True) as cluster:
        head = cluster.start(None, "--num-cpus", "1")
        worker = cluster.join(None, "--num-cpus", "1")
        worker.wait_up()
        until(lambda: alive(cluster) == 2, within_s=60)
        quick, long = submitted(cluster, "quick", "true"), submitted(cluster, "long", "sleep", "900")
        until(lambda: state(cluster, quick) == "succeeded" and state(cluster, long) == "running", within_s=120)

        killed_at = head.kill()
        until(lambda: state(cluster, long) == "lost", within_s=60)
        assert time.time() - killed_at < TRUE_WITHIN_S
        head = cluster.start(None, "--num-cpus", "1")
        until(lambda: alive(cluster) == 2, head.said, within_s=120)
        assert worker.process.poll() is None, worker.said()
        jobs = {job["submission_id"]: job["status"] for job in asked(cluster, "/api/jobs/")}
        assert jobs[f"{quick}-a1"] == "SUCCEEDED", "what ended is remembered"
        assert f"{long}-a1" in jobs
        assert state(cluster, long) == "lost", "whatever Ray says of it"
        again = graftwork(cluster, "jobs", "resubmit", long, "--root", str(cluster.folder))
        assert again.returncode == 0, again.stderr
        until(lambda: state(cluster, long) == "running", within_s=120)
        ended = graftwork(cluster, "jobs", "cancel", long, "--root", str(cluster.folder))
        assert ended.returncode == 0, ended.stderr


@pytest.mark.long
def test_the_pages_commands_run_a_job_with_the_token_and_refuse_one_without() -> None:
    """On loopback, without namespaces: no port of the node answers a caller that has no token with data."""
    with ray_cluster() as cluster:
        head = cluster.start(None, "--num-cpus", "1")
        assert cluster.token_file.stat().st_mode & 0o777 == 0o600
        job = submitted(cluster, "quick", "true")
        strange = {**cluster.environment(), "RAY_AUTH_MODE": "disabled"}
        spec = cluster.folder / "quick.yaml"
        refused = graftwork(cluster, "exec", str(spec), "--target", cluster.on, "--set", "name=other", env=strange)
        assert refused.returncode == 3, refused.stdout + refused.stderr
        assert "401" in refused.stderr
        grpc = {name for name, (what, _) in port_table().items() if what in GRPC}
        for port in grpc:
            said = dict(calls("127.0.0.1", cluster.real(port)))
            assert set(said.values()) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, (port, said)
            assert "UNAUTHENTICATED" in said.values(), (port, said)
        until(lambda: state(cluster, job) == "succeeded", within_s=60)
        below = head.below()
        head.end()
        assert psutil.wait_procs(below, timeout=20)[1] == [], "Ctrl-C leaves no process"


@pytest.mark.soak
def test_a_killed_command_leaves_no_process() -> None:
    """SIGKILL of `ray start` alone: its processes notice and end."""
    with ray_cluster() as cluster:
        head = cluster.start(None, "--num-cpus", "1")
        below = head.below()
        head.process.kill()
        head.process.wait()
        assert psutil.wait_procs(below, timeout=60)[1] == []
