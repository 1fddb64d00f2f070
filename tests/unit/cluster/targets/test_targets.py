"""Addresses that are no Ray, tokens, and what a cluster or a machine has against what a job asks: without a Ray."""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from graftwork.cluster.jobs.inputs import path_findings
from graftwork.cluster.jobs.models import Attempt, Demand, Job
from graftwork.cluster.jobs.store import Heartbeat, JobStore
from graftwork.cluster.session import token
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets import backend_of, local, ray_jobs
from graftwork.cluster.targets.local import LocalTarget
from graftwork.cluster.targets.ray_jobs_api import JobsApi, RayNode
from graftwork.environment import available_memory
from graftwork.errors import ClusterError, ConfigError
from graftwork.planning.hardware import GIB
from tests.ports import free_port


def job(root: Path, demand: Demand | None = None) -> Job:
    return Job("try", "exec", "0" * 64, str(root), {"argv": ["true"]}, demand=demand or Demand())


@contextlib.contextmanager
def answering(code: int, body: bytes, **headers: str) -> Iterator[str]:
    """A server that answers everything with that."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "headers", "found"),
    [
        (200, b"<html>hello</html>", {"content_type": "text/html"}, "no Ray dashboard"),
        (302, b"", {"location": "https://login.example.org/"}, "sends us on to https://login.example.org/"),
        (404, b"nothing here", {}, "no Ray dashboard"),
        (401, b"Unauthorized: Missing authentication token", {}, "refused the connection .*none is"),
        (403, b"expired", {}, "refused the connection .403 expired"),
        (500, b"No available agent to submit job", {}, "its Jobs API failed .500 No available agent"),
        (502, b"bad gateway", {}, "its Jobs API failed .502 bad gateway"),
    ],
)
def test_what_answers_like_no_ray_is_named(
    code: int, body: bytes, headers: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with answering(code, body, **headers) as on, JobsApi(on) as jobs:
        with pytest.raises(ClusterError) as caught:
            jobs.list()
        assert re.search(found, str(caught.value), re.DOTALL), caught.value
        assert caught.value.hint


def test_what_listens_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        on = f"http://127.0.0.1:{server.getsockname()[1]}"
        with JobsApi(on, answer_s=0.3) as jobs, pytest.raises(ClusterError, match="gives no answer"):
            jobs.list()
        assert time.monotonic() - began < 3


def test_nobody_and_the_wrong_scheme_are_told_apart() -> None:
    with JobsApi(f"http://127.0.0.1:{free_port()}") as jobs, pytest.raises(ClusterError, match="nothing answers at"):
        jobs.list()
    with answering(200, b"") as on, JobsApi(on.replace("http:", "https:")) as jobs:
        with pytest.raises(ClusterError, match="does not speak TLS") as caught:
            jobs.list()
        assert on in caught.value.hint


def test_a_proxy_is_for_other_machines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with answering(200, b"[]", content_type="application/json") as on, JobsApi(on) as jobs:
        assert jobs.list() == []
    with JobsApi("http://head.example.org:8265") as jobs, pytest.raises(ClusterError) as caught:
        jobs.list()
    assert f"the proxy {nowhere} does not lead there" in str(caught.value)
    assert caught.value.hint == "NO_PROXY=head.example.org"


def test_the_token_is_found_as_ray_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-the-home\n")
    assert token() is None, "not sent to who did not ask for one"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert token() == "of-the-home"
    (tmp_path / "file").write_text(" of-the-file \n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert token() == "of-the-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-environment")
    assert token() == "of-the-environment"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token() is None


@pytest.mark.parametrize("bad", ["two words", "line\nbreak", "tökén"])
def test_a_token_that_no_header_takes_is_refused(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", bad)
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN") as caught:
        token()
    assert bad not in str(caught.value)


def test_a_token_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none"):
        token()


HEAD = RayNode("head", True, {"CPU": 4, "memory": 16 * GIB}, {"CPU": 0})
GPUS = RayNode("gpus", False, {"CPU": 8, "GPU": 4, "memory": 64 * GIB, "accelerator_type:T4": 1}, {"CPU": 1, "GPU": 3})


@pytest.mark.parametrize(
    ("demand", "codes"),
    [
        (Demand(), []),
        (Demand(num_workers=12), ["W-CLUSTER-BUSY"]),
        (Demand(num_workers=13), ["E-CLUSTER-TOO-SMALL"]),
        (Demand(cpus_per_worker=9), ["E-CLUSTER-TOO-SMALL"]),
        (Demand(gpus_per_worker=1), []),
        (Demand(num_workers=4, gpus_per_worker=1), ["W-CLUSTER-BUSY"]),
        (Demand(num_workers=5, gpus_per_worker=1), ["E-CLUSTER-TOO-SMALL"]),
        (Demand(gpus_per_worker=1, gpu_memory_bytes_per_worker=int(13 * GIB)), []),
        (Demand(gpus_per_worker=1, gpu_memory_bytes_per_worker=int(14 * GIB)), ["E-FIT-GPU-MEMORY"]),  # of 14.6
        (Demand(gpus_per_worker=1, memory_bytes_per_worker=int(61 * GIB)), ["E-CLUSTER-TOO-SMALL"]),  # of 64
        (Demand(gpus_per_worker=0.5, gpu_memory_bytes_per_worker=int(7 * GIB)), ["E-FIT-GPU-MEMORY"]),
        (Demand(gpus_per_worker=1.5), ["W-CLUSTER-BUSY", "E-GPU-SHARE"]),
        (Demand(memory_bytes_per_worker=int(65 * GIB)), ["E-CLUSTER-TOO-SMALL"]),
        (Demand(num_workers=2, cpus_per_worker=0, memory_bytes_per_worker=int(40 * GIB)), ["E-CLUSTER-TOO-SMALL"]),
    ],
)
def test_workers_fit_a_cluster_node_by_node(demand: Demand, codes: list[str], tmp_path: Path) -> None:
    assert [finding.code for finding in ray_jobs.workers(job(tmp_path, demand), [HEAD, GPUS])] == codes


@pytest.mark.parametrize(
    "root", ["/data/my runs", "/data/$(id)", "/data/a;b", "s3://bucket/it's", "/data/`id`", "/a&b"]
)
def test_a_root_that_a_shell_would_read_is_refused(root: str) -> None:
    assert "E-ROOT-NOT-PLAIN" in [finding.code for finding in ray_jobs.roots(root, here=True)]


def test_a_folder_of_this_machine_is_no_root_of_another(tmp_path: Path) -> None:
    assert [finding.code for finding in ray_jobs.roots(str(tmp_path), here=False)] == ["E-ROOT-NOT-SHARED"]
    assert list(ray_jobs.roots(str(tmp_path), here=True)) == []
    assert list(ray_jobs.roots("s3://bucket/team-a", here=False)) == []


def test_files_that_the_driver_would_not_find_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job that was made without its inputs: `job_of` sends what can be sent (test_job_inputs.py)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "try").mkdir()
    spec = {
        "name": "try",
        "data": {"train": "rows.jsonl", "eval": str(tmp_path / "rows.jsonl")},
        "base": "hf/none",
        "argv": ["./rows.jsonl"],
        "far": "s3://bucket/rows.jsonl",
        "long": "x/" * 5000,
    }
    there = [(finding.code, finding.where) for finding in path_findings(spec, shared=True)]
    assert there == [("E-PATH-RELATIVE", "data.train"), ("W-PATH-LOCAL", "data.eval")]
    assert [finding.code for finding in path_findings(spec, shared=True, here=True)] == ["E-PATH-RELATIVE"]


def test_a_loopback_address_is_another_machine_where_its_head_says_so() -> None:
    mine = RayNode(socket.gethostname(), True, {}, {})
    assert ray_jobs.is_here("http://127.0.0.1:8265", [mine])
    assert ray_jobs.is_here("http://10.0.0.7:8265", [mine])
    assert not ray_jobs.is_here("http://127.0.0.1:8265", [HEAD]), "a tunnel"
    assert ray_jobs.is_here("http://localhost:8265", [])
    assert not ray_jobs.is_here("http://head.example.org:8265", [])


def test_workers_fit_this_machine(tmp_path: Path) -> None:
    def codes(demand: Demand) -> list[str]:
        return [finding.code for finding in local.fit(job(tmp_path, demand), str(tmp_path), tmp_path)]

    assert codes(Demand()) == []
    assert codes(Demand(num_workers=10**4)) == ["E-CPU-FIT"]
    assert codes(Demand(gpus_per_worker=10**3)) == ["E-GPU-FIT"]
    assert codes(Demand(memory_bytes_per_worker=2**60)) == ["E-MEMORY-FIT"]
    busy = (psutil.virtual_memory().total + available_memory()) // 2
    assert codes(Demand(memory_bytes_per_worker=busy)) == ["E-MEMORY-FIT"], "more than is free now"
    assert codes(Demand(memory_bytes_per_worker=available_memory() // 2)) == []


def test_secrets_of_a_spec_and_of_its_cluster_are_refused_here(tmp_path: Path) -> None:
    """As on Kubernetes: the record of a job is read by everybody who reads its store."""
    redis = {"gcs": {"backend": "redis", "redis_address": "redis://:hunter2@redis:6379"}}
    spec = {"argv": ["curl", "-H", "Authorization: Bearer hf_abcdefghijklmnopqrstuvwx"]}
    bad = replace(job(tmp_path), spec=spec, cluster=ClusterSpec.model_validate(redis))
    found = local.fit(bad, str(tmp_path), tmp_path)
    assert [(finding.code, finding.where) for finding in found] == [
        ("E-SECRET-VALUE", "argv[2]"),
        ("E-SECRET-VALUE", "gcs.redis_address"),
    ]
    assert "hunter2" not in str(found)


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings = local.fit(job(tmp_path), str(tmp_path / "file"), tmp_path)
    assert [(finding.code, finding.where) for finding in findings] == [("E-FOLDER-NOT-WRITABLE", "root")]


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="no /proc to be a disk that takes no files")
def test_a_disk_that_takes_no_files_is_refused(tmp_path: Path) -> None:
    findings = local.fit(job(tmp_path), "/proc/1", tmp_path)
    assert [finding.code for finding in findings] == ["E-FOLDER-NOT-WRITABLE"]


def test_a_driver_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no module named graftwork' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    place = LocalTarget(str(tmp_path / "root"))
    with pytest.raises(ClusterError, match="no module named graftwork") as caught:
        place.start(Attempt(job(tmp_path / "root"), 1))
    assert ".log" in caught.value.hint
    assert place.observe([Attempt(job(tmp_path / "root"), 1).id]) == {}


def test_a_stale_lock_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number in it may be another process' by now, which must not be ended."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    place = LocalTarget(str(tmp_path))
    attempt = Attempt(job(tmp_path), 1)
    lock = place._lock(attempt.id)
    lock.parent.mkdir(parents=True)
    lock.write_text(str(os.getpid()))
    assert place.observe([attempt.id])[attempt.id].job_status == "FAILED", "it had a driver, and has none"
    place.stop(attempt.id)


def test_a_job_that_another_machine_runs_for_itself_is_judged_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    runs, theirs = JobStore(str(tmp_path)), job(tmp_path)
    runs.record(theirs, "local")
    runs.open_attempt(theirs.job_id, 1)
    beat = Heartbeat(time.time(), 1, "another-machine", os.getpid())
    runs.store.write_json(asdict(beat), "jobs", theirs.job_id, "a1", "heartbeat.json")
    status = backend_of("local", str(tmp_path)).status(theirs.job_id)
    assert status.state == "running"
    assert "on another-machine, though its place does not show it" in status.why
