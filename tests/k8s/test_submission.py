"""A job that is submitted often, from anywhere, by clients that die: one object, and none after its cancellation."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graftwork.cluster.targets import backend_of
from tests.k8s.cluster import KubeCluster
from tests.k8s.commands import command, ends_with
from tests.process_races import ROOT
from tests.waiting import until

pytestmark = pytest.mark.k8s
CLIENTS, EACH = 4, 250
MOMENTS = range(1, 25)

SUBMIT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from graftwork.cluster.targets import backend_of
from tests.k8s.commands import command
on, root, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
job = command(root, "once", "print('one')")
backend = backend_of(on, job.root)
backend.place.check = lambda job: []  # a thousand dry runs are no part of the race
with ThreadPoolExecutor(16) as pool:
    names = set(pool.map(lambda _: (backend.submit(job).job_id, backend.submit(job).attempt), range(count // 2)))
assert len(names) == 1, names
"""

DIES = """
import http.client, os, signal, sys
from pathlib import Path
from graftwork.cluster.targets import backend_of
from tests.k8s.commands import command, ends_with
on, root, moment = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
job = command(root, f"dies-{moment}", ends_with(root / "never"))
left = moment

def count(_, event, called):
    global left
    if event == "c_call" and called.__name__ in ("open", "link", "rename", "replace", "sendall", "send", "recv_into"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

backend = backend_of(on, job.root)
sys.setprofile(count)
backend.submit(job)
"""


def test_a_thousand_submissions_from_several_processes_make_one_object(kube: KubeCluster, tmp_path: Path) -> None:
    clients = [_client(SUBMIT, kube.on, str(tmp_path), str(EACH)) for _ in range(CLIENTS)]
    for client in clients:
        _, errors = client.communicate(timeout=200)
        assert client.returncode == 0, errors
    job = command(tmp_path, "once", "print('one')")
    assert kube.job_names() == [f"{job.job_id}-a1"]
    kube.clear()


def test_a_client_killed_at_any_moment_leaves_at_most_one_object_and_no_orphan(
    kube: KubeCluster, tmp_path: Path
) -> None:
    """Whatever it left, the same submission completes it, and a cancellation clears it."""

    def killed(moment: int) -> int:
        client = _client(DIES, kube.on, str(tmp_path), str(moment))
        _, errors = client.communicate(timeout=100)
        assert client.returncode in (-9, 0), errors
        return client.returncode

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(killed, MOMENTS))
    assert codes.count(-9) >= 20, codes
    for moment in MOMENTS:
        job = command(tmp_path, f"dies-{moment}", ends_with(tmp_path / "never"))
        mine = [name for name in kube.job_names() if name.startswith(f"dies-{moment}-")]
        assert len(mine) <= 1
        backend = backend_of(kube.on, job.root)
        assert backend.submit(job).attempt == 1
        assert [name for name in kube.job_names() if name.startswith(f"dies-{moment}-")] == [f"{job.job_id}-a1"]
        assert backend.cancel(job.job_id).state == "cancelled"
    assert kube.job_names() == []


@pytest.mark.parametrize("held", ["pending", "suspended"])
def test_a_job_that_never_ran_is_gone_within_ten_seconds_of_its_cancellation(
    kube: KubeCluster, tmp_path: Path, held: str
) -> None:
    job = command(tmp_path, f"held-{held}", "print('never')")
    backend = backend_of(kube.on, job.root)
    if held == "pending":
        kube.fake_operator.pause()
    backend.submit(job)
    if held == "suspended":
        merge = "application/merge-patch+json"
        path = f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs/{job.job_id}-a1"
        kube.server.ask("PATCH", path, {"spec": {"suspend": True}}, merge)
        until(lambda: backend.status(job.job_id).state == "queued")
    try:
        began = time.monotonic()
        assert backend.cancel(job.job_id).state == "cancelled"
        assert time.monotonic() - began < 10
        assert kube.job_names() == []
    finally:
        kube.fake_operator.resume()


def _client(program: str, *argv: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *argv], cwd=ROOT, env=own, text=True, stdout=pipe, stderr=pipe
    )
