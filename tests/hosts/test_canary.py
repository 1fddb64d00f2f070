"""Secrets of a cluster's and of a client's environment are found nowhere after a job: searched, all of it."""

import contextlib
import json
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from tests.hosts.nodes import RayCluster, graftwork, ray_cluster
from tests.hosts.port_scan import routes

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
CANARY = "canary0f1e2d3c4b5a69788796a5b4c3d2e1f0"
SECRETS = {"AWS_SECRET_ACCESS_KEY": CANARY + "aws", "HF_TOKEN": CANARY + "hf", "AWS_ACCESS_KEY_ID": CANARY + "id"}
USES_THEM = "import os; assert os.environ['AWS_SECRET_ACCESS_KEY'].endswith('aws'); print('it has its keys')"


def test_a_secret_of_the_environment_is_found_in_no_log_answer_argument_or_record() -> None:
    with ray_cluster(SECRETS) as cluster:
        head = cluster.start(None, "--num-cpus", "1")
        token = cluster.token_file.read_text()
        lines: set[str] = set()
        done = threading.Event()
        watching = threading.Thread(target=watch, args=(lines, done), daemon=True)
        watching.start()
        spec = cluster.folder / "job.yaml"
        argv = ["python", "-c", USES_THEM]
        spec.write_text(json.dumps({"kind": "exec", "name": "keys", "root": str(cluster.folder), "argv": argv}))
        env = {**cluster.client_environment(), **SECRETS}
        sent = graftwork(cluster, "exec", str(spec), "--target", cluster.on, env=env, timeout_s=200)
        answers = all_answers(cluster, token)
        done.set()
        watching.join()
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert "it has its keys" in sent.stdout
        temp = {
            Path(word.split("=")[1])
            for process in head.below()
            for word in process.cmdline()
            if word.startswith("--temp_dir=")
        }
        assert len(temp) == 1
        for what in (CANARY, token):
            assert what not in sent.stdout + sent.stderr + head.said()
            assert not [line for line in lines if what in line], "on a command line"
            assert not [path for path, text in answers.items() if what in text], "in an answer of the dashboard"
            assert not files_with(what, next(iter(temp))), "in Ray's temp dir"
            found = files_with(what, cluster.folder)
            assert found == ([cluster.token_file] if what == token else []), "in our logs or the run store"
        assert len(answers) > 20
        assert any("keys-" in line for line in lines)


def watch(lines: set[str], done: threading.Event) -> None:
    """Every command line of the machine, until done."""
    while not done.wait(0.2):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                lines.add(" ".join(process.cmdline()))


def all_answers(cluster: RayCluster, token: str) -> dict[str, str]:
    """What every route of the dashboard answers to GET with the token; those that profile or wait are left out, and
    the one that follows a job's log: of a job that is not there, Ray (2.60) logs the request with its headers."""
    found = {}
    listed = f"{cluster.on}/api/jobs/"
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}, timeout=10) as client:
        ids = [job["submission_id"] for job in client.get(listed).json()]
        more = [path for job in ids for path in (f"/api/jobs/{job}", f"/api/jobs/{job}/logs")]
        details = [f"{path}?detail=1" for path in routes() if path.startswith("/api/v0/")]
        for path in [*routes(), *more, *details]:
            if path.endswith("/logs/tail") or "profile" in path or "delay" in path or "traceback" in path:
                continue
            with contextlib.suppress(httpx.HTTPError):
                answer = client.get(f"{cluster.on}{path}")
                if answer.status_code == 200:
                    found[path] = answer.text
    return found


def files_with(what: str, folder: Path) -> list[Path]:
    """Files below a folder that have it anywhere in their bytes."""
    return [path for path in folder.rglob("*") if path.is_file() and what.encode() in path.read_bytes()]
