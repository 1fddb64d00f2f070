"""Checks of a live Kubernetes cluster: `live_findings` for one job, `diagnose` for the cluster itself.

Both write nothing. A check without the right to read gives W-NOT-CHECKED and refuses nothing.
"""

import time
from collections.abc import Sequence
from datetime import datetime

from graftwork.cluster.jobs.models import Finding, Findings, Job, refuse, warn
from graftwork.cluster.kuberay.client import (
    HELM,
    ApiResponse,
    KubeApi,
    cluster_path,
    missing_rule,
    namespaced,
    rule_yaml,
    unchecked,
)
from graftwork.cluster.kuberay.object_view import KubeView, dig
from graftwork.cluster.kuberay.pending_reasons import WAITS, queue_findings, quota_findings, reasons

SILENT_S, STUCK_S, UNDELETED_S = 60.0, 900.0, 120.0
"""Limits for an operator that sets no status of a new RayJob, a job that waits, an object that is being deleted."""
OPERATOR = "app.kubernetes.io/name=kuberay-operator"
MADE_FOR = "ray.io/originated-from-cr-name"
VERBS = ("create", "get", "list", "delete")
"""Of RayJobs, that a submission, its status and its cancellation take."""
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PLURALS = {"RayJob": "rayjobs", "RayService": "rayservices", "PodDisruptionBudget": "poddisruptionbudgets"}
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
Objects = Sequence[KubeView]


def live_findings(api: KubeApi, job: Job, objects: Objects) -> list[Finding]:
    """Return what keeps the job's objects from running in the cluster: rights, a server dry run, names, room."""
    rights = list(rights_findings(api))
    if any(finding.level == "error" for finding in rights):
        return rights
    found = [*rights, *dry_run_findings(api, objects)]
    for check in (secret_findings, name_findings, queue_findings, quota_findings):
        found += check(api, job)
    return found


def diagnose(api: KubeApi, job: Job, selector: str) -> list[Finding]:
    """All findings. `job` stands for any job of the cluster's spec; `selector` picks our objects."""
    found: list[Finding] = []
    for plural in ("rayjobs", "rayclusters", "rayservices"):
        found += live_crd(api, plural)[1]
    found += _operator_findings(api)
    if any(finding.code == "E-CRD-ABSENT" for finding in found):
        return list(dict.fromkeys(found))
    for check in (secret_findings, name_findings, queue_findings, quota_findings):
        found += check(api, job)
    found += rights_findings(api)
    ours = api.list(namespaced("ray.io", "v1", api.place.namespace, "rayjobs"), selector)
    return list(dict.fromkeys([*found, *_stuck_job_findings(api, ours), *_leftover_findings(api, selector, ours)]))


def _operator_findings(api: KubeApi) -> Findings:
    answer = api.ask("GET", cluster_path("apps", "v1", "deployments"), query={"labelSelector": OPERATOR})
    if not answer.ok:
        yield unchecked(api.on, "whether KubeRay's operator runs", answer)
        return
    running = [item for item in answer.body.get("items", []) if dig(item, "status", "availableReplicas")]
    if not answer.body.get("items"):
        yield refuse(
            "OPERATOR-ABSENT",
            api.on,
            "no deployment of kuberay-operator",
            "the operator creates a cluster for each RayJob",
            HELM,
        )
    elif not running:
        item = answer.body["items"][0]["metadata"]
        yield refuse(
            "OPERATOR-DOWN",
            api.on,
            f"kuberay-operator in {item['namespace']} has no pod that is ready",
            "a RayJob starts only while the operator runs",
            f"kubectl describe deployment -n {item['namespace']} {item['name']}",
        )


def _stuck_job_findings(api: KubeApi, ours: Objects) -> Findings:
    """Find our jobs without a status, jobs that wait long, and deleted jobs that remain."""
    waits, now = reasons(api, ours), time.time()
    for job in ours:
        name = str(job["metadata"]["name"])
        age_s = now - datetime.fromisoformat(job["metadata"]["creationTimestamp"]).timestamp()
        phase = dig(job, "status", "jobDeploymentStatus") or ""
        why = f": {waits[name]}" if name in waits else ""
        if "deletionTimestamp" in job["metadata"]:
            if now - datetime.fromisoformat(job["metadata"]["deletionTimestamp"]).timestamp() > UNDELETED_S:
                by = ", ".join(job["metadata"].get("finalizers", []))
                yield warn(
                    "JOB-UNDELETED",
                    name,
                    f"deleted, and blocked by its finalizers {by}",
                    "the operator removes the finalizers of a deleted job",
                    f"kubectl get pods -A -l {OPERATOR}, and start the operator",
                )
        elif dig(job, "spec", "suspend"):
            if age_s > STUCK_S:
                yield warn(
                    "JOB-QUEUED",
                    name,
                    f"it waits in its queue for {age_s / 60:.0f} min{why}",
                    "a queued job starts when its queue admits it",
                    f"kubectl describe localqueue -n {api.place.namespace}; set another `queue` or a higher `priority`",
                )
        elif not phase and age_s > SILENT_S:
            yield refuse(
                "OPERATOR-SILENT",
                name,
                f"KubeRay's operator has set no status for {age_s:.0f} s",
                "the operator watches this namespace",
                f"kubectl get pods -A -l {OPERATOR}; add {api.place.namespace} to its watchNamespace",
            )
        elif phase in WAITS and age_s > STUCK_S:
            yield warn(
                "JOB-STUCK",
                name,
                f"{phase} for {age_s / 60:.0f} min{why}",
                "a job starts within 15 min of its creation",
                f"graftwork jobs cancel {name}, correct the cause, graftwork jobs resubmit {name}",
            )


def _leftover_findings(api: KubeApi, selector: str, ours: Objects) -> Findings:
    """Find clusters that were made for a job of ours which is gone."""
    answer = api.ask("GET", namespaced("ray.io", "v1", api.place.namespace, "rayclusters"))
    if not answer.ok:
        yield unchecked(api.on, "clusters that are left over", answer)
        return
    alive = {str(job["metadata"]["name"]) for job in ours}
    ownership = dict(part.split("=") for part in selector.split(",")) | {"ray.io/originated-from-crd": "RayJob"}
    for cluster in answer.body.get("items", []):
        labels = cluster["metadata"].get("labels", {})
        if ownership.items() <= labels.items() and labels.get(MADE_FOR) not in alive:
            name = cluster["metadata"]["name"]
            yield warn(
                "CLUSTER-LEFT",
                name,
                f"a RayCluster of the RayJob {labels.get(MADE_FOR)}, which is gone",
                "a cluster without its job still reserves machines",
                f"kubectl delete raycluster {name} -n {api.place.namespace}",
            )


def live_crd(api: KubeApi, plural: str) -> tuple[KubeView | None, list[Finding]]:
    """The definition of a kind of KubeRay's as the cluster has it; None where it is absent or not shown to us."""
    answer = api.ask("GET", f"{CRDS}/{plural}.ray.io")
    if answer.ok:
        served = [version["name"] for version in answer.body["spec"]["versions"] if version["served"]]
        if "v1" in served:
            return answer.body, []
        found = f"the CRD {plural}.ray.io serves {', '.join(served)}, not v1"
        return None, [refuse("CRD-OLD", api.on, found, "KubeRay v1.7 or newer", HELM)]
    if answer.absent:
        found = f"the CRD {plural}.ray.io is absent: KubeRay is not installed"
        return None, [refuse("CRD-ABSENT", api.on, found, "KubeRay v1.7 or newer", HELM)]
    return None, [unchecked(api.on, "the live CRD", answer)]


def rights_findings(api: KubeApi) -> Findings:
    """By the server's own review, verb by verb."""
    lacking = []
    for verb in VERBS:
        asked = {"namespace": api.place.namespace, "verb": verb, "group": "ray.io", "resource": "rayjobs"}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        answer = api.ask("POST", REVIEWS, review)
        if not answer.ok:
            yield unchecked(api.on, "what RBAC allows us", answer)
            return
        if not answer.body.get("status", {}).get("allowed"):
            lacking.append(verb)
    if lacking:
        rule = rule_yaml(", ".join(lacking), "rayjobs", "ray.io")
        yield refuse(
            "RBAC",
            api.on,
            f"RBAC does not let us {', '.join(lacking)} rayjobs here",
            "the user of the context has the Role graftwork-submitter (k8s/base/accounts.yaml)",
            f"have this rule added to a Role of the namespace: {rule}",
        )


def dry_run_findings(api: KubeApi, objects: Objects) -> Findings:
    """The server's own judgement of each object: schema, admission, quotas of objects."""
    for planned in objects:
        path = object_path(api.place.namespace, planned).rpartition("/")[0]
        answer = api.ask("POST", path, planned, {"fieldValidation": "Strict", "dryRun": "All"})
        if not answer.ok and answer.code != 409:
            yield _refusal_finding(api, planned, answer)


def _refusal_finding(api: KubeApi, planned: KubeView, answer: ApiResponse) -> Finding:
    where, said = f"{planned['kind']} {planned['metadata']['name']}", answer.message
    if answer.code == 404 and answer.body.get("details", {}).get("kind") == "namespaces":
        return _namespace_finding(api)
    if answer.unserved:
        return refuse("CRD-ABSENT", where, "the cluster does not know this kind", "KubeRay v1.7 or newer", HELM)
    if "exceeded quota" in said:
        return refuse(
            "QUOTA",
            where,
            said,
            "the namespace's ResourceQuota holds for objects too",
            "delete RayJobs that have ended, or have the quota raised",
        )
    rule = missing_rule(said)
    if answer.code == 403 and rule is not None:
        return refuse(
            "RBAC",
            where,
            said,
            "the user of the context needs the rule",
            f"have this rule added to a Role of the namespace: {rule}",
        )
    if answer.code == 403:
        return refuse(
            "ADMISSION",
            where,
            said,
            "an admission policy of the cluster refuses the object",
            "change the object as the message says, or ask the cluster's administrator; Secrets for jobs "
            "are listed in the ConfigMap graftwork-admission (k8s/base/admission.yaml)",
        )
    return refuse(
        "API-REFUSED",
        where,
        said,
        "the API server checks objects strictly",
        "install the CRDs of KubeRay v1.7, or correct the field that the message names",
    )


def _namespace_finding(api: KubeApi) -> Finding:
    answer = api.ask("GET", cluster_path("", "v1", "namespaces"))
    names = sorted(item["metadata"]["name"] for item in answer.body.get("items", [])) if answer.ok else []
    there = f"; there are {', '.join(names[:20])}" if names else ""
    return refuse(
        "NAMESPACE-ABSENT",
        api.on,
        f"there is no namespace {api.place.namespace!r}{there}",
        "k8s:CONTEXT/NAMESPACE",
        "correct --target, or kubectl apply -k k8s/base",
    )


def object_path(namespace: str, planned: KubeView) -> str:
    """Where an object of ours is, or would be."""
    group, _, version = planned["apiVersion"].rpartition("/")
    return namespaced(group, version, namespace, PLURALS[planned["kind"]], planned["metadata"]["name"])


def secret_findings(api: KubeApi, job: Job) -> Findings:
    """Names and keys alone; values are not looked at."""
    for (name, where), keys in _secret_keys(job).items():
        answer = api.ask("GET", namespaced("", "v1", api.place.namespace, "secrets", name))
        if answer.absent:
            yield refuse(
                "SECRET-ABSENT",
                where,
                f"there is no Secret {name!r} in {api.place.namespace}",
                "pods wait for a Secret that does not exist",
                f"kubectl create secret generic {name} --namespace "
                f"{api.place.namespace} " + " ".join(f"--from-file={key}=FILE" for key in keys),
            )
        elif not answer.ok:
            yield unchecked(api.on, "Secrets and their keys", answer)
            return
        else:
            lacking = [key for key in keys if key not in answer.body.get("data", {})]
            if lacking:
                yield refuse(
                    "SECRET-KEY",
                    where,
                    f"the Secret {name!r} has no key {', '.join(lacking)}",
                    f"it has {', '.join(sorted(answer.body.get('data', {}))) or 'none'}",
                    "correct the key, or add it to the Secret",
                )


def _secret_keys(job: Job) -> dict[tuple[str, str], list[str]]:
    """Keys by Secret and by the spec's key that names it."""
    cluster = job.cluster
    wanted: dict[tuple[str, str], list[str]] = {}
    for name, reference in cluster.secret_env.items():
        secret, _, key = reference.partition("/")
        wanted.setdefault((secret, f"secret_env.{name}"), []).append(key)
    for given, where, keys in (
        (cluster.storage.secret, "storage.secret", STORE_KEYS),
        (cluster.auth.secret, "auth.secret", ("auth_token",)),
        (cluster.image_pull_secret, "image_pull_secret", (".dockerconfigjson",)),
        (cluster.gcs.redis_secret, "gcs.redis_secret", ("password",)),
    ):
        if given is not None:
            wanted[given, where] = list(keys)
    return wanted


def name_findings(api: KubeApi, job: Job) -> Findings:
    """A service account, a priority class, a volume claim."""
    cluster, namespace = job.cluster, api.place.namespace
    yield from _absence_findings(
        api,
        namespaced("", "v1", namespace, "serviceaccounts", cluster.service_account),
        "service_account",
        "service account",
        "ACCOUNT-ABSENT",
        "kubectl apply -k k8s/base",
    )
    if cluster.storage.claim is not None:
        yield from _absence_findings(
            api,
            namespaced("", "v1", namespace, "persistentvolumeclaims", cluster.storage.claim),
            "storage.claim",
            "PersistentVolumeClaim",
            "CLAIM-ABSENT",
            "create it with access mode ReadWriteMany",
        )
    if cluster.priority is not None and cluster.queue is None:
        yield from _absence_findings(
            api,
            cluster_path("scheduling.k8s.io", "v1", "priorityclasses", cluster.priority),
            "priority",
            "PriorityClass",
            "PRIORITY-ABSENT",
            "kubectl get priorityclasses lists those there are",
        )


def _absence_findings(api: KubeApi, path: str, where: str, what: str, code: str, hint: str) -> Findings:
    name, answer = path.rpartition("/")[2], api.ask("GET", path)
    if answer.absent:
        yield refuse(code, where, f"there is no {what} {name!r}", "pods need the objects that they name", hint)
    elif not answer.ok:
        yield unchecked(api.on, f"the {what} {name!r}", answer)
