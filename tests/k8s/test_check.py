"""What a living cluster lacks for a job is said before anything is made, and what cannot be looked at is said too.

The kinds that this API server does not have (Secrets, quotas, reviews of rights) are answered by the proxy before it,
in the form of Kubernetes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.jobs.models import Finding
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets.kuberay import KubeRayTarget
from graftwork.errors import ClusterError
from tests.k8s.cluster import KubeCluster
from tests.k8s.commands import CLUSTER, command
from tests.k8s.faults import Fault, Faults
from tests.k8s.server import NAMESPACE

pytestmark = pytest.mark.k8s
HERE = f"/api/v1/namespaces/{NAMESPACE}"
QUEUES = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{NAMESPACE}/localqueues"
CLUSTER_QUEUES = "/apis/kueue.x-k8s.io/v1beta1/clusterqueues"


@pytest.fixture
def faults(kube: KubeCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with Faults(kube.server) as proxy:
        monkeypatch.setenv("KUBECONFIG", str(proxy.kubeconfig))
        yield proxy


def found(kube: KubeCluster, folder: Path, **changes: Any) -> dict[str, Finding]:
    """Findings on a job of the cluster with those changes, by code."""
    cluster = ClusterSpec.model_validate({**CLUSTER.model_dump(mode="json"), **changes})
    place = KubeRayTarget(kube.on, str(folder), cluster)
    return {finding.code: finding for finding in place.check(command(folder, "probe", "print(1)", cluster))}


def test_a_good_job_is_taken_and_what_was_not_looked_at_is_said(kube: KubeCluster, tmp_path: Path) -> None:
    codes = found(kube, tmp_path)
    assert not [code for code in codes if code.startswith("E-")], codes
    assert "not checked" in codes["W-NOT-CHECKED"].problem
    assert "no such kind" in codes["W-NOT-CHECKED"].problem
    assert kube.job_names() == [], "nothing was made"


def test_a_secret_and_its_key_must_be_there(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    faults.absent(f"{HERE}/secrets/none", "none")
    faults.answer(f"{HERE}/secrets/s3", {"data": {"AWS_ACCESS_KEY_ID": "Y2FuYXJ5"}})
    faults.answer(f"{HERE}/secrets/hub", {"data": {"token": "Y2FuYXJ5"}})
    codes = found(kube, tmp_path, secret_env={"A": "none/key"})
    assert "there is no Secret 'none'" in codes["E-SECRET-ABSENT"].problem
    assert "--from-file=key=FILE" in codes["E-SECRET-ABSENT"].hint
    codes = found(kube, tmp_path, storage={"claim": "shared", "secret": "s3"})
    assert codes["E-SECRET-KEY"].problem == "the Secret 's3' has no key AWS_SECRET_ACCESS_KEY"
    assert "Y2FuYXJ5" not in str(codes)
    codes = found(kube, tmp_path, secret_env={"HF_TOKEN": "hub/token"})
    assert not [code for code in codes if "SECRET" in code]


def test_account_and_claim_must_be_there(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    faults.absent(f"{HERE}/serviceaccounts/", "graftwork")
    faults.absent(f"{HERE}/persistentvolumeclaims/", "shared")
    faults.absent("/priorityclasses/", "urgent")
    codes = found(kube, tmp_path, priority="urgent")
    assert {"E-ACCOUNT-ABSENT", "E-CLAIM-ABSENT", "E-PRIORITY-ABSENT"} <= set(codes)


def test_rights_are_asked_for_and_the_missing_rule_is_named(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    faults.answer("selfsubjectaccessreviews", {"status": {"allowed": False}}, method="POST", code=201)
    codes = found(kube, tmp_path)
    rule = '{apiGroups: ["ray.io"], resources: [rayjobs], verbs: [create, get, list, delete]}'
    assert rule in codes["E-RBAC"].hint


def test_a_queue_must_be_there_and_one_that_is_paused_is_said(kube: KubeCluster, tmp_path: Path) -> None:
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue"}
    kube.server.ask("POST", QUEUES, {**queue, "metadata": {"name": "gpu"}, "spec": {}})
    kube.server.ask("POST", QUEUES, {**queue, "metadata": {"name": "held"}, "spec": {"stopPolicy": "Hold"}})
    assert not [code for code in found(kube, tmp_path, queue="gpu") if "QUEUE" in code]
    absent = found(kube, tmp_path, queue="gpus")["E-QUEUE-ABSENT"]
    assert (absent.problem, absent.rule) == (f"there is no LocalQueue 'gpus' in {NAMESPACE}", "there are: gpu, held")
    assert "is stopped (Hold)" in found(kube, tmp_path, queue="held")["W-QUEUE-STOPPED"].problem


def test_a_queue_that_can_never_admit_the_job_is_refused(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    def quotas(cpu: str) -> dict[str, Any]:
        resources = [{"name": "cpu", "nominalQuota": cpu}, {"name": "memory", "nominalQuota": "256Gi"}]
        groups = [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": "cpus", "resources": resources}]}]
        return {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "ClusterQueue", "spec": {"resourceGroups": groups}}

    for name, cpu in (("small", "11"), ("large", "12")):
        kube.server.ask("POST", CLUSTER_QUEUES, {**quotas(cpu), "metadata": {"name": name}})
        local = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": name}}
        kube.server.ask("POST", QUEUES, {**local, "spec": {"clusterQueue": name}})
    refused = found(kube, tmp_path, queue="small")["E-QUEUE-QUOTA"]
    assert refused.problem.startswith("the ClusterQueue 'small' can never admit it: the job takes head 4 cpu")
    assert not [code for code in found(kube, tmp_path, queue="large") if "QUEUE" in code]
    faults.refuse(403, "clusterqueues is forbidden", path="clusterqueues")
    cluster = ClusterSpec.model_validate({**CLUSTER.model_dump(mode="json"), "queue": "small"})
    told = KubeRayTarget(kube.on, str(tmp_path), cluster).check(command(tmp_path, "probe", "print(1)", cluster))
    assert "E-QUEUE-QUOTA" not in {one.code for one in told}
    assert any("the quota of the ClusterQueue 'small'" in one.problem for one in told if one.code == "W-NOT-CHECKED")


def test_quotas_of_pods_and_of_objects(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    status = {"hard": {"requests.cpu": "8", "pods": "4"}, "used": {"requests.cpu": "0", "pods": "3"}}
    faults.answer(f"{HERE}/resourcequotas", {"items": [{"metadata": {"name": "team"}, "status": status}]})
    codes = found(kube, tmp_path)
    assert codes["E-QUOTA"].problem == "the job takes 12 requests.cpu; the ResourceQuota 'team' has 8"
    assert "of which 3 are in use" in codes["W-QUOTA-IN-USE"].problem
    faults.clear()
    said = (
        'rayjobs.ray.io "x" is forbidden: exceeded quota: jobs, requested: count/rayjobs.ray.io=1, used: 5, limited: 5'
    )
    faults.refuse(403, said, method="POST", path="dryRun=All")
    assert found(kube, tmp_path)["E-QUOTA"].problem == said


def test_a_namespace_that_is_not_there(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    gone = {
        "kind": "Status",
        "code": 404,
        "message": f'namespaces "{NAMESPACE}" not found',
        "details": {"name": NAMESPACE, "kind": "namespaces"},
    }
    faults.answer("dryRun=All", gone, method="POST", code=404)
    faults.answer("/api/v1/namespaces$", {"items": [{"metadata": {"name": "team-b"}}]})
    faults.answer(r"/api/v1/namespaces\?", {"items": [{"metadata": {"name": "team-b"}}]})
    assert "there are team-b" in found(kube, tmp_path)["E-NAMESPACE-ABSENT"].problem


def test_without_kuberay_and_with_an_old_one(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    crd = dict(kube.server.ask("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io")[1])
    fields = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del fields["preRunningDeadlineSeconds"]
    faults.answer("customresourcedefinitions/rayjobs.ray.io", crd)
    codes = found(kube, tmp_path)
    assert any("preRunningDeadlineSeconds" in finding.where for finding in codes.values()), codes
    faults.clear()
    faults.absent("customresourcedefinitions/rayjobs.ray.io", "rayjobs.ray.io")
    codes = found(kube, tmp_path)
    assert "helm install kuberay-operator" in codes["E-CRD-ABSENT"].hint


def test_an_absent_kind_is_not_taken_for_an_absent_job(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    faults.add(Fault("GET", re.compile("/rayjobs"), 1, 404))
    with pytest.raises(ClusterError, match="does not know this kind"):
        KubeRayTarget(kube.on, str(tmp_path), CLUSTER).observe(["x-a1"])


def test_doctor_tells_of_operator_and_jobs(kube: KubeCluster, faults: Faults, tmp_path: Path) -> None:
    place = KubeRayTarget(kube.on, str(tmp_path), CLUSTER)
    assert not [finding for finding in place.doctor() if finding.level == "error"]
    faults.answer("/apis/apps/v1/deployments", {"items": []})
    old = {"metadata": {"name": "old-a1", "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": {}}
    slow = {
        **old,
        "metadata": {**old["metadata"], "name": "slow-a1"},
        "status": {"jobDeploymentStatus": "Initializing", "rayClusterName": "slow-c"},
    }
    left = {
        "metadata": {
            "name": "left-c",
            "labels": {
                "ray.io/originated-from-cr-name": "gone-a1",
                "ray.io/originated-from-crd": "RayJob",
                "app.kubernetes.io/managed-by": "graftwork",
            },
        }
    }
    faults.answer(f"{NAMESPACE}/rayjobs", {"items": [old, slow]})
    faults.answer(f"{NAMESPACE}/rayclusters", {"items": [left]})
    waits = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    pod = {
        "metadata": {"name": "slow-head", "labels": {"ray.io/cluster": "slow-c"}},
        "status": {"containerStatuses": [{"state": {"waiting": waits}}]},
    }
    faults.answer(f"{HERE}/pods", {"items": [pod]})
    codes = {finding.code: finding for finding in place.doctor()}
    assert {"E-OPERATOR-ABSENT", "E-OPERATOR-SILENT", "W-JOB-STUCK", "W-CLUSTER-LEFT"} <= set(codes)
    assert "ImagePullBackOff: Back-off pulling image" in codes["W-JOB-STUCK"].problem
