"""A real API server of Kubernetes' custom resources on a real etcd, on loopback, with keys of its own.

It knows KubeRay's CRDs and no core kinds: neither Secrets nor Pods nor Namespaces. It can be killed and come back.
With `core`, it applies the ValidatingAdmissionPolicies that are there (tests/k8s/core_kinds.py).
"""

import functools
import os
import shutil
import ssl
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from graftwork.storage.store import cache_root
from tests.k8s.certificates import authority, certificate
from tests.ports import free_port
from tests.waiting import until

CONTEXT, NAMESPACE = "tests", "team-a"
UP_S = 60.0
WAITING_ADMISSION = "NamespaceLifecycle,MutatingAdmissionWebhook,ValidatingAdmissionWebhook,MutatingAdmissionPolicy"
"""Plugins that wait for core kinds that are not there."""
POLICIES = "ValidatingAdmissionPolicy"
"""The plugin that waits for those of `tests/k8s/core_kinds.py`."""
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
QUEUES = {"localqueues": "LocalQueue", "clusterqueues": "ClusterQueue", "workloads": "Workload"}
"""Kueue's kinds that we read, as CRDs without a schema."""


def crd_files() -> list[Path]:
    """KubeRay's CRDs, in the folder that $GRAFTWORK_CRDS names: docs/guide.md says how to get them."""
    folder = os.environ.get("GRAFTWORK_CRDS")
    return sorted(Path(folder).glob("*.yaml")) if folder else []


def require_parts() -> None:
    """Skip the test, with the reason, where the server cannot be had. `make test-k8s` fails there."""
    missing = [name for name in ("etcd", "openssl") if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"NOT TESTED ON KUBERNETES: no {' and no '.join(missing)} here; apt-get install etcd-server openssl"
        )
    if not crd_files():
        pytest.skip("NOT TESTED ON KUBERNETES: GRAFTWORK_CRDS names no folder with KubeRay's CRDs (docs/guide.md)")
    if not binary().is_file():
        pytest.skip(f"NOT TESTED ON KUBERNETES: no {binary()}; `make test-k8s` builds it from Debian's packages")


def binary() -> Path:
    """The API server that `tests/k8s/build_apiserver.sh` makes."""
    return cache_root() / "k8s" / "apiserver"


@dataclass
class ApiServer:
    """One server with its own folder, ports and keys."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gwk8s-")))
    port: int = field(default_factory=free_port)
    etcd_ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))
    core: str = "https://127.0.0.1:1"
    """Where it reads core kinds; by default nothing answers there."""
    _etcd: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    _server: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """With one context, CONTEXT."""
        return self.folder / "kubeconfig.yaml"

    def make_keys(self) -> None:
        """An authority, and certificates of the server and of a client, unless they are there."""
        if not (self.folder / "client.crt").exists():
            authority(self.folder)
            certificate(self.folder, "server", "/CN=127.0.0.1")
            certificate(self.folder, "client", "/O=system:masters/CN=tests")

    def start(self) -> None:
        """Serve KubeRay's CRDs, and Kueue's queues."""
        self.make_keys()
        write_kubeconfig(self.kubeconfig, self.url, self.folder)
        write_kubeconfig(self.folder / "core.yaml", self.core, self.folder)
        self._start_etcd()
        self.back()
        for path in crd_files():
            self._define(yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        for plural, kind in QUEUES.items():
            self._define(queue_crd(plural, kind))

    def kill(self) -> None:
        """SIGKILL the server; etcd keeps what it stored."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def back(self) -> None:
        """Serve again, on the same port, with the same keys."""
        ca, core = self.folder / "ca.crt", self.folder / "core.yaml"
        disabled = WAITING_ADMISSION if self.core != ApiServer.core else f"{WAITING_ADMISSION},{POLICIES}"
        self._server = self._run(
            str(binary()),
            f"--etcd-servers=http://127.0.0.1:{self.etcd_ports[0]}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={self.folder}",
            f"--tls-cert-file={self.folder / 'server.crt'}",
            f"--tls-private-key-file={self.folder / 'server.key'}",
            f"--client-ca-file={ca}",
            f"--kubeconfig={core}",
            f"--authentication-kubeconfig={core}",
            f"--authorization-kubeconfig={core}",
            "--authentication-skip-lookup",
            "--enable-priority-and-fairness=false",
            f"--disable-admission-plugins={disabled}",
            name="apiserver",
        )
        self._until(lambda: self.ask("GET", CRDS)[0] == 200, "the API server answers")
        for crd in self.ask("GET", CRDS)[1]["items"]:
            self._until_served(crd)

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, Any]:
        """One request with the client's certificate: the answer's code and JSON; 0 where nobody answers."""
        try:
            answer = self._client.request(
                method, f"{self.url}{path}", json=body, headers={"Content-Type": kind} if body is not None else {}
            )
        except httpx.TransportError:
            return 0, None
        return answer.status_code, answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def remove(self) -> None:
        """Kill both and delete what they stored."""
        self.kill()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @functools.cached_property
    def _client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        context.load_cert_chain(self.folder / "client.crt", self.folder / "client.key")
        return httpx.Client(verify=context, timeout=30)

    def _define(self, crd: Any) -> None:
        code, answer = self.ask("POST", CRDS, crd)
        assert code == 201, answer
        self._until_served(crd)

    def _until_served(self, crd: Any) -> None:
        spec = crd["spec"]
        path = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
        self._until(lambda: self.ask("GET", path)[0] == 200, f"{path} is served")

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in self.etcd_ports)
        self._etcd = self._run(
            "etcd",
            "--data-dir",
            str(self.folder / "etcd"),
            "--listen-client-urls",
            client,
            "--advertise-client-urls",
            client,
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"default={peer}",
            "--unsafe-no-fsync",
            name="etcd",
        )

    def _run(self, *command: str, name: str) -> "subprocess.Popen[bytes]":
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)

    def _until(self, holds: Any, what: str) -> None:
        log = self.folder / "apiserver.log"
        until(holds, lambda: f"{what}: {log.read_text()[-3000:]}", within_s=UP_S)


def write_kubeconfig(path: Path, url: str, keys: Path, *, context: str = CONTEXT, client: str = "client") -> None:
    """A kubeconfig of one context, with the certificate `client` of the folder `keys`."""
    user = {"client-certificate": str(keys / f"{client}.crt"), "client-key": str(keys / f"{client}.key")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context,
        "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": str(keys / "ca.crt")}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": context, "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
    }
    path.write_text(yaml.safe_dump(config))


def queue_crd(plural: str, kind: str) -> dict[str, Any]:
    """A CRD of Kueue's group that takes any spec."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": "v1beta1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.kueue.x-k8s.io",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": "kueue.x-k8s.io",
            "scope": "Cluster" if plural == "clusterqueues" else "Namespaced",
            "names": {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"},
            "versions": [version],
        },
    }
