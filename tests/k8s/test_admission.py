"""The admission policy of k8s/base on a real API server: our own objects pass, each way to other Secrets does not."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwork.cluster.targets import backend_of
from tests.k8s.core_kinds import KINDS, CoreKinds
from tests.k8s.server import CONTEXT, ApiServer, require_parts
from tests.kuberay_objects import GONE, GPUS, changed, cluster, job, rayjob, rayservice
from tests.process_races import ROOT

pytestmark = [
    pytest.mark.k8s,
    pytest.mark.skipif(shutil.which("kustomize") is None, reason="no kustomize here: apt-get install kustomize"),
]
NAMESPACE, OTHER = "graftwork", "somebody-elses"
PLURALS = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCluster": "rayclusters"}
MERGE = "application/merge-patch+json"


def base() -> list[dict[str, Any]]:
    """The objects of k8s/base that admission reads, and the namespaces."""
    done = subprocess.run(["kustomize", "build", str(ROOT / "k8s" / "base")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    kinds = {kind for _, kind, _ in KINDS.values()}
    other = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OTHER}}
    return [one for one in objects if one["kind"] in kinds] + [other]


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    require_parts()
    server = ApiServer()
    server.make_keys()
    with CoreKinds(server.folder, base()) as core:
        server.core = core.url
        try:
            server.start()
            yield server
        finally:
            server.remove()


def ask(server: ApiServer, made: dict[str, Any], namespace: str = NAMESPACE, query: str = "?dryRun=All") -> str:
    """Empty for an object that is taken, else the server's message."""
    path = f"/apis/{made['apiVersion']}/namespaces/{namespace}/{PLURALS[made['kind']]}{query}"
    code, answer = server.ask("POST", path, {**made, "metadata": {**made["metadata"], "namespace": namespace}})
    assert code in (201, 403), answer
    return "" if code == 201 else str(answer["message"])


def shipped() -> list[dict[str, Any]]:
    """All of k8s/examples."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "k8s" / "examples").glob("*.yaml"))]
    return [one for text in texts for one in yaml.safe_load_all(text) if one["kind"] in PLURALS]


def cluster_of(made: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster that the operator makes of a RayJob or a RayService."""
    part = made["spec"].get("rayClusterSpec") or made["spec"]["rayClusterConfig"]
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "made"}, "spec": part}


REDIS = {"gcs": {"backend": "redis", "redis_address": "graftwork-redis:6379", "redis_secret": "graftwork-redis"}}
OWN = [
    rayjob(),
    rayjob(workers=[GPUS], queue="gpu"),
    rayjob(workers=[{**GPUS, "spot": True}]),
    rayjob(**REDIS),
    rayjob(gcs={"backend": "rocksdb"}),
    rayjob(storage={"uri": "file:///runs", "claim": "runs"}),
    rayjob(secret_env={"HF_TOKEN": "hub/token"}),
    rayservice(workers=[{**GPUS, "max_count": 4}]),
    rayservice(**REDIS),
]


@pytest.mark.parametrize("made", [*OWN, *shipped()], ids=lambda made: str(made["kind"]))
def test_our_own_objects_pass(server: ApiServer, made: dict[str, Any]) -> None:
    assert ask(server, made) == ""
    assert ask(server, cluster_of(made)) == ""


HEAD, WORKER = ("spec.rayClusterSpec.headGroupSpec.template", "spec.rayClusterSpec.workerGroupSpecs.0.template")
RAY = f"{HEAD}.spec.containers.0"
SECRET = {"secretRef": {"name": "graftwork-redis"}}
KEY = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "graftwork-redis", "key": "password"}}}
EVIL: dict[str, tuple[dict[str, Any], str]] = {
    "envFrom": ({f"{RAY}.envFrom": [SECRET]}, "envFrom reads Secrets that are listed"),
    "envFrom of an init container": (
        {f"{WORKER}.spec.initContainers.0.envFrom": [SECRET]},
        "envFrom reads Secrets that are listed",
    ),
    "env": ({f"{WORKER}.spec.containers.0.env": [KEY]}, "env reads Secrets that are listed"),
    "env of an init container": ({f"{HEAD}.spec.initContainers.0.env": [KEY]}, "env reads Secrets that are listed"),
    "a Secret's volume": (
        {f"{HEAD}.spec.volumes": [{"name": "s", "secret": {"secretName": "x"}}]},
        "Secrets and tokens are not mounted",
    ),
    "a projected Secret": (
        {f"{WORKER}.spec.volumes": [{"name": "s", "projected": {"sources": [{"secret": {"name": "x"}}]}}]},
        "Secrets and tokens are not mounted",
    ),
    "a projected token": (
        {f"{HEAD}.spec.volumes": [{"name": "s", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]},
        "Secrets and tokens are not mounted",
    ),
    "a CSI volume": (
        {f"{HEAD}.spec.volumes": [{"name": "s", "csi": {"driver": "secrets-store.csi.k8s.io"}}]},
        "Secrets and tokens are not mounted",
    ),
    "an account of the head": ({f"{HEAD}.spec.serviceAccountName": "default"}, "a head runs as one of the accounts"),
    "no account": ({f"{HEAD}.spec.serviceAccountName": GONE}, "a head runs as one of the accounts"),
    "the old field of an account": ({f"{WORKER}.spec.serviceAccount": "default"}, "workers run as one of the accounts"),
    "an account of a worker": ({f"{WORKER}.spec.serviceAccountName": "admin"}, "workers run as one of the accounts"),
    "a token of the head": ({f"{HEAD}.spec.automountServiceAccountToken": True}, "a head runs as one of the accounts"),
    "a token of a worker": (
        {f"{WORKER}.spec.automountServiceAccountToken": GONE},
        "workers run as one of the accounts",
    ),
    "a job with an autoscaler's token": (
        {
            "spec.rayClusterSpec.enableInTreeAutoscaling": True,
            f"{HEAD}.spec.serviceAccountName": GONE,
            f"{HEAD}.spec.automountServiceAccountToken": True,
        },
        "a head runs as one of the accounts",
    ),
    "a submitter's pod": ({"spec.submissionMode": "K8sJobMode"}, "submissionMode HTTPMode"),
    "another job's cluster": (
        {"spec.clusterSelector": {"ray.io/cluster": "theirs"}, "spec.rayClusterSpec": GONE},
        "no clusterSelector",
    ),
    "an opening of the network": (
        {"spec.rayClusterSpec.networkPolicy": {"mode": "DenyAllIngress"}},
        "not allowed here.*networkPolicy",
    ),
    "a label of an endpoint": (
        {f"{HEAD.replace('.', '|')}|metadata|labels|app.kubernetes.io/component": "serve"},
        "opens the way to the Kubernetes API",
    ),
    "the label of Redis": (
        {f"{WORKER.replace('.', '|')}|metadata|labels|app.kubernetes.io/name": "graftwork-redis"},
        "are the operator's",
    ),
    "Redis' password": (
        {
            "spec.rayClusterSpec.gcsFaultToleranceOptions": {
                "redisAddress": "mine:6379",
                "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "endpoint-keys", "key": "admin"}}},
            }
        },
        "the password of Redis is in a Secret that is listed",
    ),
    "a token's Secret": (
        {"spec.rayClusterSpec.authOptions.secretName": "graftwork-redis"},
        "authOptions has mode, and secretName",
    ),
    "the autoscaler's command": (
        {"spec.rayClusterSpec.autoscalerOptions": {"command": ["env"]}},
        "autoscalerOptions sets no image",
    ),
}


@pytest.mark.parametrize("name", EVIL)
def test_a_way_to_a_secret_is_refused(server: ApiServer, name: str) -> None:
    changes, message = EVIL[name]
    told = ask(server, changed(rayjob(), changes))
    assert "ValidatingAdmissionPolicy 'graftwork'" in told
    assert re.search(message, told, re.DOTALL), told


def test_an_object_of_all_ways_at_once_is_refused(server: ApiServer) -> None:
    """As somebody writes it who has the rights of graftwork-submitter and wants all Secrets of the namespace."""
    evil = changed(
        rayjob(),
        {
            "spec.entrypoint": "env",
            f"{RAY}.envFrom": [SECRET, {"secretRef": {"name": "endpoint-keys"}}],
            f"{HEAD}.spec.serviceAccountName": "default",
            f"{HEAD}.spec.automountServiceAccountToken": True,
            f"{HEAD.replace('.', '|')}|metadata|labels|app.kubernetes.io/component": "serve",
        },
    )
    assert "ValidatingAdmissionPolicy 'graftwork'" in ask(server, evil)
    assert ask(server, evil, OTHER) == "", "a namespace without the ConfigMap is none of ours"


@pytest.mark.parametrize(
    "made", [rayservice(workers=[{**GPUS, "max_count": 4}]), cluster_of(rayjob())], ids=lambda made: str(made["kind"])
)
def test_services_and_clusters_are_held_to_the_same(server: ApiServer, made: dict[str, Any]) -> None:
    part = "spec.rayClusterConfig" if made["kind"] == "RayService" else "spec"
    for path, value, message in (
        (f"{part}.headGroupSpec.template.spec.containers.0.envFrom", [SECRET], "envFrom reads Secrets"),
        (f"{part}.headGroupSpec.template.spec.serviceAccountName", "default", "a head runs as one of the accounts"),
        (f"{part}.workerGroupSpecs.0.template.spec.containers.0.env", [KEY], "env reads Secrets"),
        (f"{part}.autoscalerOptions", {"image": "mine"}, "autoscalerOptions sets no image"),
    ):
        assert message in ask(server, changed(made, {path: value}))


def test_an_update_is_held_to_the_same_and_the_operators_changes_pass(server: ApiServer) -> None:
    path = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
    made = rayjob()
    assert ask(server, made, query="") == ""
    one = f"{path}/{made['metadata']['name']}"
    evil = changed(made, {f"{RAY}.envFrom": [SECRET]})["spec"]
    code, answer = server.ask("PATCH", one, {"spec": evil}, MERGE)
    assert code == 403
    assert "ValidatingAdmissionPolicy 'graftwork'" in answer["message"]
    changes: list[dict[str, Any]] = [
        {"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}},
        {"metadata": {"finalizers": []}},
        {"spec": {"suspend": True}},
    ]
    for change in changes:
        assert server.ask("PATCH", one, change, MERGE)[0] == 200
    assert server.ask("DELETE", one)[0] == 200


def test_preflight_says_which_secrets_there_are(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    for name, refused in (("payroll/key", True), ("endpoint-keys/admin", False)):
        own = cluster(storage={"uri": f"file://{tmp_path}", "claim": "runs"}, secret_env={"KEY": name})
        backend = backend_of(f"k8s:{CONTEXT}/{NAMESPACE}", f"file://{tmp_path}", own)
        found = {one.code: one for one in backend.plan(job(own)).findings if one.level == "error"}
        assert ("E-ADMISSION" in found) == refused, found
        if refused:
            assert "s3-credentials endpoint-keys" in found["E-ADMISSION"].problem
            assert "ConfigMap graftwork-admission" in found["E-ADMISSION"].hint


def test_the_secrets_of_the_docs_are_listed() -> None:
    """What docs/clusters.md has people create, its cluster.yaml may use."""
    [listed] = [one["data"]["secrets"].split() for one in base() if one["kind"] == "ConfigMap"]
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert set(re.findall(r"create secret generic (\S+)", text)) <= set(listed)
