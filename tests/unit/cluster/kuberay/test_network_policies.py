"""Connections that the rendered manifests of k8s/ must allow, and connections that they must deny."""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwork.cluster.kuberay.labels import pod_labels
from graftwork.cluster.kuberay.pods import PodSettings, head_template, worker_template
from graftwork.cluster.spec import ClusterSpec
from tests.network_policies import Address, Pod, Policy, allowed
from tests.process_races import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("kustomize") is None, reason="no kustomize here: apt-get install kustomize"
)
K8S = ROOT / "k8s"
NAMESPACE = "graftwork"
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
TREES = [
    ("base",),
    *((f"overlays/{path.name}",) for path in sorted((K8S / "overlays").iterdir())),
    *(("base", name) for name in COMPONENTS),
]


def ray_pod(node_type: str, kind: str = "train") -> Pod:
    """A pod with the labels of our builder and those that KubeRay 1.7 adds (controllers/ray/common/pod.go). The Job
    `redis-cleanup` has the head's, but for its node type (raycluster_controller.go, buildRedisCleanupJob)."""
    spec = ClusterSpec()
    facts = PodSettings(
        spec, pod_labels(spec, "name", "name-0123456789", kind), "s3://b/p", None, serves=kind == "serve"
    )
    template = (
        worker_template(facts, spec.workers[0])
        if node_type == "worker"
        else head_template(facts, autoscales=kind == "serve")
    )
    added = {
        "ray.io/cluster": "c",
        "ray.io/node-type": node_type,
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return Pod(NAMESPACE, {**template["metadata"]["labels"], **added})


HEAD, WORKER, CLEANUP = ray_pod("head"), ray_pod("worker"), ray_pod("redis-cleanup")
SERVING, REPLICA = ray_pod("head", "serve"), ray_pod("worker", "serve")
REDIS = Pod(NAMESPACE, {"app.kubernetes.io/name": "graftwork-redis"})
STRAY = Pod(NAMESPACE, {"app": "somebody-elses"})
DNS = Pod("kube-system", {"k8s-app": "kube-dns"})
NODE_DNS = Pod("kube-system", {"k8s-app": "node-local-dns"})
OPERATOR = Pod("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
STRANGER = Pod("other")
CLIENT = Pod("shop", {}, {"graftwork.dev/client": "true"})
PROMETHEUS = Pod("monitoring", {"app.kubernetes.io/name": "prometheus"})
MINIO = Pod("storage", {"graftwork.dev/store": "true"})
S3, PRIVATE, DOCUMENTED = Address("52.216.8.1"), Address("10.0.1.5"), Address("192.0.2.7")
IMDS, POD_IDENTITY, POD_IDENTITY_6 = Address("169.254.169.254"), Address("169.254.170.23"), Address("fd00:ec2::23")
GKE, NODE_CACHE, API = Address("169.254.169.252"), Address("169.254.20.10"), Address("10.96.0.1")
Pair = tuple[Pod, Pod | Address, int, str]

ALWAYS: list[Pair] = [
    (HEAD, DNS, 53, "UDP"),
    (WORKER, DNS, 53, "TCP"),
    (CLEANUP, DNS, 53, "UDP"),
    (WORKER, HEAD, 6379, "TCP"),
    (HEAD, WORKER, 30123, "TCP"),
    (OPERATOR, HEAD, 8265, "TCP"),
    (OPERATOR, SERVING, 8000, "TCP"),
    (CLIENT, SERVING, 8000, "TCP"),
    (WORKER, S3, 443, "TCP"),
    (CLEANUP, S3, 443, "TCP"),
    (SERVING, API, 443, "TCP"),
]
NEVER: list[Pair] = [
    (STRANGER, HEAD, 8265, "TCP"),
    (STRANGER, SERVING, 8000, "TCP"),
    (CLIENT, HEAD, 8265, "TCP"),
    (STRAY, HEAD, 6379, "TCP"),
    (STRAY, S3, 443, "TCP"),
    (WORKER, S3, 80, "TCP"),
    (WORKER, STRANGER, 443, "TCP"),
    (HEAD, API, 443, "TCP"),
    (WORKER, API, 443, "TCP"),
    (REPLICA, API, 443, "TCP"),
    (STRANGER, REDIS, 6379, "TCP"),
    (WORKER, REDIS, 6379, "TCP"),
    (REDIS, S3, 443, "TCP"),
    (REDIS, IMDS, 80, "TCP"),
    (STRAY, IMDS, 80, "TCP"),
    (WORKER, IMDS, 443, "TCP"),
    (SERVING, IMDS, 443, "TCP"),
    (STRAY, POD_IDENTITY, 80, "TCP"),
    # the gRPC server that Ray Serve opens in each replica, on a port of its choice
    (STRANGER, SERVING, 39871, "TCP"),
    (CLIENT, SERVING, 39871, "TCP"),
    (STRANGER, REPLICA, 39871, "TCP"),
    (CLIENT, REPLICA, 39871, "TCP"),
    (OPERATOR, REPLICA, 39871, "TCP"),
]
OPENED: dict[str, list[Pair]] = {
    "overlays/gcs-redis": [(HEAD, REDIS, 6379, "TCP"), (CLEANUP, REDIS, 6379, "TCP"), (SERVING, REDIS, 6379, "TCP")],
    "overlays/dev": [(HEAD, MINIO, 9000, "TCP"), (WORKER, MINIO, 8333, "TCP"), (CLEANUP, MINIO, 9000, "TCP")],
    "overlays/monitoring": [(PROMETHEUS, HEAD, 8080, "TCP"), (PROMETHEUS, SERVING, 8000, "TCP")],
    "eks-pod-identity": [(WORKER, POD_IDENTITY, 80, "TCP"), (HEAD, POD_IDENTITY_6, 80, "TCP")],
    "ec2-instance-role": [(WORKER, IMDS, 80, "TCP"), (HEAD, IMDS, 80, "TCP")],
    "gke-workload-identity": [
        (WORKER, GKE, 988, "TCP"),
        (HEAD, GKE, 988, "TCP"),
        (WORKER, IMDS, 80, "TCP"),
        (HEAD, IMDS, 80, "TCP"),
    ],
    "nodelocal-dns": [
        (HEAD, NODE_CACHE, 53, "UDP"),
        (WORKER, NODE_DNS, 53, "UDP"),
        (WORKER, IMDS, 53, "UDP"),
        (CLEANUP, NODE_CACHE, 53, "TCP"),
    ],
    "private-store": [(HEAD, DOCUMENTED, 9000, "TCP"), (WORKER, DOCUMENTED, 9000, "TCP")],
}
"""Connections that one overlay or component opens. Every other tree must deny them."""
CLOSED: list[Pair] = [
    (WORKER, PRIVATE, 443, "TCP"),
    (WORKER, PRIVATE, 9000, "TCP"),
    (WORKER, Address("192.0.3.7"), 9000, "TCP"),
    (WORKER, IMDS, 988, "TCP"),
    (WORKER, POD_IDENTITY, 443, "TCP"),
    (WORKER, NODE_CACHE, 443, "TCP"),
    (WORKER, GKE, 80, "TCP"),
    (STRAY, MINIO, 9000, "TCP"),
    (PROMETHEUS, HEAD, 8265, "TCP"),
]


@functools.cache
def policies(*parts: str) -> tuple[Policy, ...]:
    """The NetworkPolicies of a folder of k8s/, with components."""
    kustomization = {"resources": [f"../{parts[0]}"], "components": [f"../components/{name}" for name in parts[1:]]}
    return rendered(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": NAMESPACE,
            **kustomization,
        },
        "ours",
    )


def rendered(kustomization: dict[str, Any], place: str) -> tuple[Policy, ...]:
    """The policies of a kustomization in a folder of a copy of k8s/."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(K8S, Path(folder) / "k8s", ignore=shutil.ignore_patterns("__pycache__"))
        own = Path(folder) / "k8s" / place
        own.mkdir()
        (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(["kustomize", "build", str(own)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    objects = yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)
    return tuple(one for one in objects if one["kind"] == "NetworkPolicy")


def named(pair: Pair) -> str:
    source, target, port, protocol = pair
    return f"{source} -> {target} {protocol} {port}"


@pytest.mark.parametrize("parts", TREES, ids=" + ".join)
def test_each_tree_opens_its_own_pairs_and_no_others(parts: tuple[str, ...]) -> None:
    made, own = policies(*parts), OPENED.get(parts[-1], [])
    for pair in [*ALWAYS, *own]:
        assert allowed(made, *pair), f"{named(pair)} is denied"
    others = [pair for name, pairs in OPENED.items() if name != parts[-1] for pair in pairs if pair not in own]
    for pair in [*NEVER, *CLOSED, *others]:
        assert not allowed(made, *pair), f"{named(pair)} is allowed"


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_valid_for_kubernetes(name: str) -> None:
    import kubernetes_validate

    added = [one for one in policies("base", name) if one not in policies("base")]
    assert added
    for one in added:
        kubernetes_validate.validate(one, "1.34", strict=True)


def test_every_tree_is_covered() -> None:
    """A new overlay or component states what it opens, or opens nothing."""
    opening = {tree[-1] for tree in TREES if len(policies(*tree)) > len(policies("base"))}
    assert opening == set(OPENED)


def test_the_overlay_of_the_docs_opens_a_private_store_on_its_own_port() -> None:
    """docs/clusters.md shows one kustomization that joins overlays and components."""
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"```yaml\n(# k8s/overlays/ours/kustomization\.yaml\n.*?)```", text, re.DOTALL)
    made = rendered(yaml.safe_load(shown), "overlays/ours")
    for pair in [
        *ALWAYS,
        (WORKER, Address("10.20.3.4"), 8333, "TCP"),
        *OPENED["eks-pod-identity"],
        *OPENED["overlays/gcs-redis"],
    ]:
        assert allowed(made, *pair), f"{named(pair)} is denied"
    for pair in [
        *NEVER,
        (WORKER, PRIVATE, 9000, "TCP"),
        (WORKER, Address("10.20.3.4"), 443, "TCP"),
        (STRAY, Address("10.20.3.4"), 8333, "TCP"),
        *OPENED["private-store"],
    ]:
        assert not allowed(made, *pair), f"{named(pair)} is allowed"
