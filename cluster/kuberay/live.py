"""What a job needs of a living cluster: its kinds, our rights there, names that must exist, room. Nothing is written.

What a cluster does not let us see is said to be not checked; it is no reason to refuse.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.cluster.backend import Finding, Job
from graftwork.cluster.kuberay import api_errors
from graftwork.cluster.kuberay.api import ApiResponse, KubeApi, cluster_path, namespaced
from graftwork.cluster.kuberay.findings import Found
from graftwork.cluster.kuberay.live_names import name_findings, secret_findings, unchecked
from graftwork.cluster.kuberay.live_room import queue_findings, quota_findings

VERBS = ("create", "get", "list", "delete")
"""Of RayJobs, that a submission, its status and its cancellation take."""
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
HELM = (
    "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 --values k8s/operator-values.yaml "
    "--namespace kuberay-system --create-namespace"
)


def live_crd(api: KubeApi, plural: str) -> tuple[Mapping[str, Any] | None, list[Finding]]:
    """The definition of a kind of KubeRay's as the cluster has it; None where it is absent or not shown to us."""
    answer = api.ask("GET", f"{CRDS}/{plural}.ray.io")
    if answer.ok:
        served = [version["name"] for version in answer.body["spec"]["versions"] if version["served"]]
        if "v1" in served:
            return answer.body, []
        found = f"the CRD {plural}.ray.io serves {', '.join(served)}, not v1"
        return None, [Finding("E-CRD-OLD", "error", api.on, found, "KubeRay v1.7 or newer", HELM)]
    if answer.absent:
        found = f"the CRD {plural}.ray.io is absent: KubeRay is not installed"
        return None, [Finding("E-CRD-ABSENT", "error", api.on, found, "KubeRay v1.7 or newer", HELM)]
    return None, [unchecked(api.on, "the live CRD", answer)]


def live_findings(api: KubeApi, job: Job, objects: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """All but the CRD."""
    rights = list(rights_findings(api))
    if any(finding.level == "error" for finding in rights):
        return rights
    found = [*rights, *_dry_run(api, objects)]
    for check in (secret_findings, name_findings, queue_findings, quota_findings):
        found += check(api, job)
    return found


def rights_findings(api: KubeApi) -> Found:
    """By the server's own review, verb by verb."""
    lacking = []
    for verb in VERBS:
        asked = {"namespace": api.place.namespace, "verb": verb, "group": "ray.io", "resource": "rayjobs"}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
                  "spec": {"resourceAttributes": asked}}  # fmt: skip
        answer = api.ask("POST", REVIEWS, review)
        if not answer.ok:
            yield unchecked(api.on, "what RBAC allows us", answer)
            return
        if not answer.body.get("status", {}).get("allowed"):
            lacking.append(verb)
    if lacking:
        rule = api_errors.rule_yaml(", ".join(lacking), "rayjobs", "ray.io")
        yield Finding(
            "E-RBAC", "error", api.on, f"RBAC does not let us {', '.join(lacking)} rayjobs here",
            "the user of the context has the Role graftwork-submitter (k8s/base/accounts.yaml)",
            f"have this rule added to a Role of the namespace: {rule}",
        )  # fmt: skip


def _dry_run(api: KubeApi, objects: Sequence[Mapping[str, Any]]) -> Found:
    """The server's own judgement of each object: schema, admission, quotas of objects."""
    for planned in objects:
        path = object_path(api.place.namespace, planned).rpartition("/")[0]
        answer = api.ask("POST", path, planned, {"fieldValidation": "Strict", "dryRun": "All"})
        if not answer.ok and answer.code != 409:
            yield _refused(api, planned, answer)


def _refused(api: KubeApi, planned: Mapping[str, Any], answer: ApiResponse) -> Finding:
    where, said = f"{planned['kind']} {planned['metadata']['name']}", answer.message
    if answer.code == 404 and answer.body.get("details", {}).get("kind") == "namespaces":
        return _no_namespace(api)
    if answer.unserved:
        return Finding("E-CRD-ABSENT", "error", where, "the cluster does not know this kind", "KubeRay v1.7", HELM)
    if "exceeded quota" in said:
        return Finding("E-QUOTA", "error", where, said, "the namespace's ResourceQuota holds for objects too",
                       "delete RayJobs that have ended, or have the quota raised")  # fmt: skip
    rule = api_errors.missing_rule(said)
    if answer.code == 403 and rule is not None:
        return Finding("E-RBAC", "error", where, said, "the user of the context needs the rule",
                       f"have this rule added to a Role of the namespace: {rule}")  # fmt: skip
    if answer.code == 403:
        return Finding("E-ADMISSION", "error", where, said, "an admission rule of the cluster refuses it",
                       "change the object as the message says, or ask the cluster's administrator; Secrets for jobs "
                       "are listed in the ConfigMap graftwork-admission (k8s/base/admission.yaml)")  # fmt: skip
    return Finding("E-API-REFUSED", "error", where, said, "the API server checks objects strictly",
                   "an older KubeRay lacks fields: its CRDs are to be v1.7's")  # fmt: skip


def _no_namespace(api: KubeApi) -> Finding:
    answer = api.ask("GET", cluster_path("", "v1", "namespaces"))
    names = sorted(item["metadata"]["name"] for item in answer.body.get("items", [])) if answer.ok else []
    there = f"; there are {', '.join(names[:20])}" if names else ""
    return Finding("E-NAMESPACE-ABSENT", "error", api.on, f"there is no namespace {api.place.namespace!r}{there}",
                   "k8s:CONTEXT/NAMESPACE", "correct the name, or kubectl apply -k k8s/base")  # fmt: skip


PLURALS = {"RayJob": "rayjobs", "RayService": "rayservices", "PodDisruptionBudget": "poddisruptionbudgets"}


def object_path(namespace: str, planned: Mapping[str, Any]) -> str:
    """Where an object of ours is, or would be."""
    group, _, version = planned["apiVersion"].rpartition("/")
    return namespaced(group, version, namespace, PLURALS[planned["kind"]], planned["metadata"]["name"])
