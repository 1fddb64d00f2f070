"""A head that is killed and comes back with what it knew: its workers rejoin, its jobs are told of truly."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.hosts.own import OwnCluster, graftwork, own_cluster, until
from tests.ports import free_port

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
TRUE_WITHIN_S = 30.0


@contextmanager
def redis(folder: Path) -> Iterator[tuple[str, str]]:
    """(address, password) of a Redis of the test's own, on loopback."""
    if shutil.which("redis-server") is None:
        pytest.skip("REDIS IS NOT TESTED HERE: there is no redis-server (apt-get install redis-server)")
    port, password = free_port(), secrets.token_hex(16)
    config = folder / "redis.conf"
    config.touch(mode=0o600)
    config.write_text(f"port {port}\nbind 127.0.0.1\nrequirepass {password}\nsave ''\ndir {folder}\n")
    with open(folder / "redis.log", "wb") as log:
        server = subprocess.Popen(["redis-server", str(config)], stdout=log, stderr=log)
    try:
        yield f"redis://127.0.0.1:{port}", password
    finally:
        server.kill()
        server.wait()


def asked(cluster: OwnCluster, path: str) -> Any:
    """What the dashboard answers to who has the token."""
    token = cluster.token_file.read_text()
    return httpx.get(f"{cluster.on}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=20).json()


def alive(cluster: OwnCluster) -> int:
    """Nodes that the head knows to live."""
    with contextlib.suppress(httpx.HTTPError, ValueError):
        nodes = asked(cluster, "/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)
    return 0


def submitted(cluster: OwnCluster, name: str, *argv: str) -> str:
    """Start a program as a job; its id."""
    spec = cluster.folder / f"{name}.yaml"
    spec.write_text(json.dumps({"kind": "exec", "name": name, "root": str(cluster.folder), "argv": argv}))
    sent = graftwork(cluster, "exec", str(spec), "--target", cluster.on, "--detach", "--json")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    return next(path.name for path in (cluster.folder / "jobs").iterdir() if path.name.startswith(f"{name}-"))


def state(cluster: OwnCluster, job_id: str) -> str:
    said = graftwork(cluster, "jobs", "status", job_id, "--root", str(cluster.folder), "--json")
    return str(json.loads(said.stdout)["state"])


@pytest.mark.parametrize("store", ["rocksdb", "redis"])
def test_a_killed_head_comes_back_with_its_jobs_and_its_workers(store: str) -> None:
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(own_cluster())
        argument, password = f"rocksdb {cluster.folder / 'gcs'}", ""
        if store == "redis":
            argument, password = stack.enter_context(redis(cluster.folder))
            cluster.more = {"RAY_REDIS_PASSWORD": password}
        keeping = ("--gcs-storage", argument, "--cpus", "1")
        head = cluster.start(None, *keeping)
        assert not password or password not in all_command_lines(), "a password is no argument"
        worker = cluster.join(None, "--cpus", "1")
        worker.wait_up()
        until(lambda: alive(cluster) == 2, 60)
        quick, long = submitted(cluster, "quick", "true"), submitted(cluster, "long", "sleep", "900")
        until(lambda: state(cluster, quick) == "succeeded" and state(cluster, long) == "running", 120)

        killed_at = head.kill()
        took = until(lambda: state(cluster, long) == "lost", 60)
        assert time.time() - killed_at < TRUE_WITHIN_S, took
        head = cluster.start(None, *keeping)
        until(lambda: alive(cluster) == 2, 120, head.said)
        assert worker.process.poll() is None, worker.said()
        jobs = {job["submission_id"]: job["status"] for job in asked(cluster, "/api/jobs/")}
        assert jobs[f"{quick}-a1"] == "SUCCEEDED", "what ended is remembered"
        assert f"{long}-a1" in jobs
        assert state(cluster, long) == "lost", "whatever Ray says of it"
        again = graftwork(cluster, "jobs", "resubmit", long, "--root", str(cluster.folder))
        assert again.returncode == 0, again.stderr
        until(lambda: state(cluster, long) == "running", 120)
        ended = graftwork(cluster, "jobs", "cancel", long, "--root", str(cluster.folder))
        assert ended.returncode == 0, ended.stderr


def all_command_lines() -> str:
    """What `ps` shows to everyone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return "\n".join(found)


def test_ctrl_c_and_kill_leave_no_process_and_no_folder() -> None:
    with own_cluster() as cluster:
        for way in ("end", "kill"):
            head = cluster.start(None, "--cpus", "1")
            below = head.below()
            folders = {part for process in below for part in process.cmdline() if "gw-ray-" in part}
            assert folders
            getattr(head, way)()
            assert psutil.wait_procs(below, timeout=20)[1] == []
        assert os.listdir(cluster.folder / "cache" / "own-clusters") != [], "the killed one's record"
        empty = graftwork(cluster, "cluster", "stop")
        assert empty.returncode == 2, empty.stderr
        assert os.listdir(cluster.folder / "cache" / "own-clusters") == []
