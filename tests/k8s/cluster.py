"""A Kubernetes namespace with KubeRay, as far as a client of RayJobs sees: `with kube_cluster() as kube: ...`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.k8s.fake_operator import FakeOperator
from tests.k8s.ray_head import Head
from tests.k8s.server import CONTEXT, NAMESPACE, ApiServer, require_parts

JOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"


@dataclass(frozen=True)
class KubeCluster:
    """The real API server, the fake operator and the real Ray that it runs jobs on."""

    server: ApiServer
    head: Head
    fake_operator: FakeOperator
    namespace: str = NAMESPACE

    @property
    def on(self) -> str:
        """For `--target`, with KUBECONFIG set to `kubeconfig`."""
        return f"k8s:{CONTEXT}/{self.namespace}"

    @property
    def kubeconfig(self) -> Path:
        return self.server.kubeconfig

    def with_ray(self) -> "KubeCluster":
        """Once its Ray runs; without one a RayJob's cluster comes up for ever."""
        if not self.head.address:
            self.head.start()
        return self

    def job_names(self) -> list[str]:
        """RayJob objects that are there."""
        code, found = self.server.ask("GET", JOBS)
        assert code == 200, found
        return sorted(item["metadata"]["name"] for item in found["items"])

    def clear(self) -> None:
        """Delete all RayJobs."""
        self.server.ask("DELETE", JOBS)


@contextmanager
def kube_cluster(secrets: Mapping[tuple[str, str], str] | None = None, *, ray: bool = True) -> Iterator[KubeCluster]:
    """Started, with KUBECONFIG of this process set to it; about 20 s. Skips the test, loudly, where it can't be had.

    `secrets`: values by (Secret, key) that jobs' pods see. Without `ray` it takes 6 s.
    """
    require_parts()
    server, head = ApiServer(), Head()
    fake_operator, before = FakeOperator(server, head, secrets), os.environ.get("KUBECONFIG")
    try:
        server.start()
        fake_operator.start()
        os.environ["KUBECONFIG"] = str(server.kubeconfig)
        kube = KubeCluster(server, head, fake_operator)
        yield kube.with_ray() if ray else kube
    finally:
        fake_operator.end()
        head.remove()
        server.remove()
        if before is None:
            os.environ.pop("KUBECONFIG", None)
        else:
            os.environ["KUBECONFIG"] = before
