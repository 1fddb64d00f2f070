"""An API server that is busy, cut off, closed to us or not there: tried again, or told, with what to do next."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from graftwork.cluster.jobs.models import Job, JobBackend
from graftwork.cluster.targets import backend_of
from graftwork.errors import ClusterError, ConfigError
from tests.k8s.certificates import certificate
from tests.k8s.cluster import KubeCluster
from tests.k8s.commands import command, ends_with
from tests.k8s.faults import Fault, Faults
from tests.k8s.server import CONTEXT, NAMESPACE, write_kubeconfig
from tests.ports import free_port

pytestmark = pytest.mark.k8s
JOBS = "/rayjobs"
RBAC = (
    'rayjobs.ray.io is forbidden: User "dev" cannot create resource "rayjobs" in API group "ray.io" in the namespace '
    f'"{NAMESPACE}"'
)


@pytest.fixture
def faults(kube: KubeCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with Faults(kube.server) as proxy:
        monkeypatch.setenv("KUBECONFIG", str(proxy.kubeconfig))
        yield proxy
    kube.clear()


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(kube: KubeCluster, faults: Faults, tmp_path: Path, code: int) -> None:
    job = command(tmp_path, f"busy-{code}", "print('on')")
    wait = {"Retry_After": "1"} if code == 429 else {}
    for method in ("GET", "POST", "DELETE"):
        faults.refuse(code, "not now", method=method, path=JOBS, times=2, **wait)
    began = time.monotonic()
    backend = backend_of(kube.on, job.root)
    backend.submit(job)
    assert kube.job_names() == [f"{job.job_id}-a1"]
    if code == 429:
        assert time.monotonic() - began >= 2, "Retry-After is kept to"
    assert backend.status(job.job_id).state == "pending"


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_connection_that_is_cut_makes_neither_two_objects_nor_none(
    kube: KubeCluster, faults: Faults, tmp_path: Path, cut: str
) -> None:
    job = command(tmp_path, f"cut-{cut}", ends_with(tmp_path / "end"))
    for method in ("GET", "POST", "DELETE"):
        faults.add(Fault(method, _jobs(), 1, cut="before" if cut == "before" else "after"))
    backend = backend_of(kube.on, job.root)
    backend.submit(job)
    assert kube.job_names() == [f"{job.job_id}-a1"]
    backend.cancel(job.job_id)
    assert kube.job_names() == []
    assert ("POST", f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs?fieldValidation=Strict") in faults.asked


def test_a_slow_server_is_waited_for(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    job = command(tmp_path, "slow", "print('on')")
    faults.add(Fault("POST", _jobs(), 1, delay_s=3))
    assert backend_of(kube.on, job.root).submit(job).attempt == 1


def test_a_failing_server_is_told_after_some_seconds(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    job = command(tmp_path, "never", "print('on')")
    faults.refuse(500, "etcdserver: request timed out", method="POST", path=JOBS, times=10**9)
    began = time.monotonic()
    told = refusal(backend_of(kube.on, job.root), job)
    assert time.monotonic() - began < 12
    assert "500" in told
    assert "etcdserver: request timed out" in told


def test_a_forbidden_verb_names_the_rule_that_is_missing(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    job = command(tmp_path, "closed", "print('on')")
    faults.refuse(403, RBAC, method="POST", path="fieldValidation=Strict$")
    told = refusal(backend_of(kube.on, job.root), job)
    assert "cannot create" in told
    assert '{apiGroups: ["ray.io"], resources: [rayjobs], verbs: [create]}' in told


def test_no_kubeconfig_a_wrong_context_and_no_server_are_told(
    kube: KubeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = command(tmp_path, "nowhere", "print('on')")
    told = refusal(backend_of(f"k8s:prod/{NAMESPACE}", job.root), job)
    assert f"no context 'prod'; it has {CONTEXT}" in told
    with pytest.raises(ConfigError, match="k8s:CONTEXT/NAMESPACE"):
        backend_of(f"k8s:{CONTEXT}", job.root)

    nowhere = tmp_path / "kubeconfig.yaml"
    monkeypatch.setenv("KUBECONFIG", str(nowhere))
    told = refusal(backend_of(kube.on, job.root), job)
    assert "no usable kubeconfig" in told
    assert "set KUBECONFIG" in told

    write_kubeconfig(nowhere, f"https://127.0.0.1:{free_port()}", kube.server.folder)
    began = time.monotonic()
    told = refusal(backend_of(kube.on, job.root), job)
    assert time.monotonic() - began < 12
    assert "does not answer" in told
    assert "refused" in told


def test_expired_certificates_are_told(kube: KubeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = command(tmp_path, "expired", "print('on')")
    keys = kube.server.folder
    certificate(keys, "old-server", "/CN=127.0.0.1", expired=True)
    certificate(keys, "old-client", "/O=system:masters/CN=tests", expired=True)
    with Faults(kube.server, "old-server") as proxy:
        monkeypatch.setenv("KUBECONFIG", str(proxy.kubeconfig))
        told = refusal(backend_of(kube.on, job.root), job)
    assert "certificate has expired" in told
    assert "renew it" in told
    config = tmp_path / "old.yaml"
    write_kubeconfig(config, kube.server.url, keys, client="old-client")
    monkeypatch.setenv("KUBECONFIG", str(config))
    told = refusal(backend_of(kube.on, job.root), job)
    assert "401" in told
    assert "log in to the cluster again" in told


def test_a_kubeconfig_that_is_no_yaml_is_told(
    kube: KubeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = command(tmp_path, "garbage", "print('on')")
    config = tmp_path / "bad.yaml"
    for text in ("{unclosed", "just words", yaml.safe_dump({"kind": "Config", "contexts": []})):
        config.write_text(text)
        monkeypatch.setenv("KUBECONFIG", str(config))
        assert "kubeconfig" in refusal(backend_of(kube.on, job.root), job)


def _jobs() -> "re.Pattern[str]":
    return re.compile(JOBS)


def refusal(backend: JobBackend, job: Job) -> str:
    """What a submission says that could have no cluster; nothing was left behind."""
    with pytest.raises(ClusterError) as caught:
        backend.submit(job)
    assert caught.value.exit_code == 3
    return str(caught.value)
