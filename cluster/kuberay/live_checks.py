"""What a job needs of a living cluster: its kinds, our rights there, names that must exist, room. Nothing is written.

What a cluster does not let us see is said to be not checked; it is no reason to refuse.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from graftwork.cluster.jobs.models import Finding, Job
from graftwork.cluster.kuberay import client as api_errors
from graftwork.cluster.kuberay.client import ApiResponse, KubeApi, cluster_path, namespaced
from graftwork.cluster.kuberay.object_view import Found, dig, listed, refuse, warn
from graftwork.cluster.kuberay.pending_reasons import KUEUE, KUEUE_VERSIONS, WAITS, amount, nominal_findings, reasons
from graftwork.cluster.kuberay.pods import GPU
from graftwork.cluster.spec import quantity

# What is wrong with a cluster itself, whatever the job: KubeRay, rights, names, room; jobs that hang, clusters left.
#
# Reads alone; what it may not read it says.


SILENT_S, STUCK_S, UNDELETED_S = 60.0, 900.0, 120.0
"""An operator that has said nothing of a new RayJob; a job that waits; an object that is being deleted."""
OPERATOR = "app.kubernetes.io/name=kuberay-operator"
MADE_FOR = "ray.io/originated-from-cr-name"
Objects = Sequence[Mapping[str, Any]]


def diagnose(api: KubeApi, job: Job, selector: str) -> list[Finding]:
    """All findings. `job` stands for any job of the cluster's spec; `selector` picks our objects."""
    found: list[Finding] = []
    for plural in ("rayjobs", "rayclusters", "rayservices"):
        found += live_crd(api, plural)[1]
    found += _operator(api)
    if any(finding.code == "E-CRD-ABSENT" for finding in found):
        return list(dict.fromkeys(found))
    for check in (secret_findings, name_findings, queue_findings, quota_findings):
        found += check(api, job)
    found += rights_findings(api)
    ours = api.list(namespaced("ray.io", "v1", api.place.namespace, "rayjobs"), selector)
    return list(dict.fromkeys([*found, *_stuck(api, ours), *_leaked(api, selector, ours)]))


def _operator(api: KubeApi) -> Found:
    answer = api.ask("GET", cluster_path("apps", "v1", "deployments"), query={"labelSelector": OPERATOR})
    if not answer.ok:
        yield unchecked(api.on, "whether KubeRay's operator runs", answer)
        return
    running = [item for item in answer.body.get("items", []) if dig(item, "status", "availableReplicas")]
    if not answer.body.get("items"):
        yield refuse(
            "OPERATOR-ABSENT", api.on, "no deployment of kuberay-operator", "it makes clusters of RayJobs", HELM
        )
    elif not running:
        item = answer.body["items"][0]["metadata"]
        yield refuse(
            "OPERATOR-DOWN",
            api.on,
            f"kuberay-operator in {item['namespace']} has no pod that is ready",
            "",
            f"kubectl describe deployment -n {item['namespace']} {item['name']}",
        )


def _stuck(api: KubeApi, ours: Objects) -> Found:
    """Jobs of ours that nobody looks at, that wait long, or that are not let go."""
    held = reasons(api, ours)
    for job in ours:
        name, age_s = str(job["metadata"]["name"]), age(job["metadata"]["creationTimestamp"])
        phase = dig(job, "status", "jobDeploymentStatus") or ""
        why = f": {held[name]}" if name in held else ""
        if "deletionTimestamp" in job["metadata"]:
            if age(job["metadata"]["deletionTimestamp"]) > UNDELETED_S:
                by = ", ".join(job["metadata"].get("finalizers", []))
                yield warn(
                    "JOB-UNDELETED",
                    name,
                    f"deleted, and held by its finalizers {by}",
                    "",
                    "see that KubeRay's operator runs",
                )
        elif dig(job, "spec", "suspend"):
            if age_s > STUCK_S:
                yield warn(
                    "JOB-QUEUED",
                    name,
                    f"it waits in its queue for {age_s / 60:.0f} min{why}",
                    "",
                    "kubectl describe localqueue; another queue or a higher priority",
                )
        elif not phase and age_s > SILENT_S:
            yield refuse(
                "OPERATOR-SILENT",
                name,
                f"KubeRay's operator has said nothing of it for {age_s:.0f} s",
                "the operator watches this namespace",
                "see that it runs, and its watchNamespace",
            )
        elif phase in WAITS and age_s > STUCK_S:
            yield warn(
                "JOB-STUCK",
                name,
                f"{phase} for {age_s / 60:.0f} min{why}",
                "",
                "graftwork jobs cancel, mend it, resubmit",
            )


def _leaked(api: KubeApi, selector: str, ours: Objects) -> Found:
    """Clusters made for a job of ours that is no more."""
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
                "it holds machines",
                f"kubectl delete raycluster {name} -n {api.place.namespace}",
            )


def age(stamp: str) -> float:
    """Seconds since a time of the API server's."""
    return time.time() - datetime.fromisoformat(stamp).timestamp()


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
        rule = api_errors.rule_yaml(", ".join(lacking), "rayjobs", "ray.io")
        yield Finding(
            "E-RBAC",
            "error",
            api.on,
            f"RBAC does not let us {', '.join(lacking)} rayjobs here",
            "the user of the context has the Role graftwork-submitter (k8s/base/accounts.yaml)",
            f"have this rule added to a Role of the namespace: {rule}",
        )


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
        return Finding(
            "E-QUOTA",
            "error",
            where,
            said,
            "the namespace's ResourceQuota holds for objects too",
            "delete RayJobs that have ended, or have the quota raised",
        )
    rule = api_errors.missing_rule(said)
    if answer.code == 403 and rule is not None:
        return Finding(
            "E-RBAC",
            "error",
            where,
            said,
            "the user of the context needs the rule",
            f"have this rule added to a Role of the namespace: {rule}",
        )
    if answer.code == 403:
        return Finding(
            "E-ADMISSION",
            "error",
            where,
            said,
            "an admission rule of the cluster refuses it",
            "change the object as the message says, or ask the cluster's administrator; Secrets for jobs "
            "are listed in the ConfigMap graftwork-admission (k8s/base/admission.yaml)",
        )
    return Finding(
        "E-API-REFUSED",
        "error",
        where,
        said,
        "the API server checks objects strictly",
        "an older KubeRay lacks fields: its CRDs are to be v1.7's",
    )


def _no_namespace(api: KubeApi) -> Finding:
    answer = api.ask("GET", cluster_path("", "v1", "namespaces"))
    names = sorted(item["metadata"]["name"] for item in answer.body.get("items", [])) if answer.ok else []
    there = f"; there are {', '.join(names[:20])}" if names else ""
    return Finding(
        "E-NAMESPACE-ABSENT",
        "error",
        api.on,
        f"there is no namespace {api.place.namespace!r}{there}",
        "k8s:CONTEXT/NAMESPACE",
        "correct the name, or kubectl apply -k k8s/base",
    )


PLURALS = {"RayJob": "rayjobs", "RayService": "rayservices", "PodDisruptionBudget": "poddisruptionbudgets"}


def object_path(namespace: str, planned: Mapping[str, Any]) -> str:
    """Where an object of ours is, or would be."""
    group, _, version = planned["apiVersion"].rpartition("/")
    return namespaced(group, version, namespace, PLURALS[planned["kind"]], planned["metadata"]["name"])


# What a job names in its namespace must be there: Secrets and their keys, an account, a claim, a priority class.


STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def secret_findings(api: KubeApi, job: Job) -> Found:
    """Names and keys alone; values are not looked at."""
    for (name, where), keys in _wanted_secrets(job).items():
        answer = api.ask("GET", namespaced("", "v1", api.place.namespace, "secrets", name))
        if answer.absent:
            yield refuse(
                "SECRET-ABSENT",
                where,
                f"there is no Secret {name!r} in {api.place.namespace}",
                "pods that name a Secret wait for it",
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


def _wanted_secrets(job: Job) -> dict[tuple[str, str], list[str]]:
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


def name_findings(api: KubeApi, job: Job) -> Found:
    """A service account, a priority class, a volume claim."""
    cluster, namespace = job.cluster, api.place.namespace
    yield from _exists(
        api,
        namespaced("", "v1", namespace, "serviceaccounts", cluster.service_account),
        "service_account",
        "service account",
        "ACCOUNT-ABSENT",
        "kubectl apply -k k8s/base",
    )
    if cluster.storage.claim is not None:
        yield from _exists(
            api,
            namespaced("", "v1", namespace, "persistentvolumeclaims", cluster.storage.claim),
            "storage.claim",
            "PersistentVolumeClaim",
            "CLAIM-ABSENT",
            "create it with access mode ReadWriteMany",
        )
    if cluster.priority is not None and cluster.queue is None:
        yield from _exists(
            api,
            cluster_path("scheduling.k8s.io", "v1", "priorityclasses", cluster.priority),
            "priority",
            "PriorityClass",
            "PRIORITY-ABSENT",
            "kubectl get priorityclasses lists those there are",
        )


def _exists(api: KubeApi, path: str, where: str, what: str, code: str, hint: str) -> Found:
    name, answer = path.rpartition("/")[2], api.ask("GET", path)
    if answer.absent:
        yield refuse(code, where, f"there is no {what} {name!r}", "what pods name must be there", hint)
    elif not answer.ok:
        yield unchecked(api.on, f"the {what} {name!r}", answer)


def unchecked(on: str, what: str, answer: ApiResponse) -> Finding:
    """A warning that something could not be looked at, and what it would take."""
    rule = api_errors.missing_rule(answer.message) if answer.code == 403 else None
    why = "this API server has no such kind" if answer.unserved else f"{answer.code} {answer.message[:200]}"
    return warn(
        "NOT-CHECKED",
        on,
        f"not checked: {what} ({why})",
        "",
        f"the rule {rule} would let us look" if rule else "look with kubectl",
    )


# Whether there is room for a job: Kueue's queue, the quotas of the namespace.


def queue_findings(api: KubeApi, job: Job) -> Found:
    """The LocalQueue is there, is open, and its ClusterQueue takes jobs."""
    name = job.cluster.queue
    if name is None:
        return
    for version in KUEUE_VERSIONS:
        answer = api.ask("GET", namespaced(KUEUE, version, api.place.namespace, "localqueues", name))
        if not answer.unserved:
            break
    if answer.ok:
        yield from _state(answer.body, name)
        yield from _nominal(api, version, answer.body, job)
    elif answer.absent:
        listing = api.ask("GET", namespaced(KUEUE, version, api.place.namespace, "localqueues"))
        names = sorted(item["metadata"]["name"] for item in listing.body.get("items", [])) if listing.ok else []
        yield refuse(
            "QUEUE-ABSENT",
            "queue",
            f"there is no LocalQueue {name!r} in {api.place.namespace}",
            f"there are: {', '.join(names) or 'none'}",
            "take one of these, or have it made",
        )
    elif answer.unserved:
        yield refuse(
            "QUEUE-NO-KUEUE",
            "queue",
            f"queue={name}, and Kueue is not installed in this cluster",
            "a job with a queue is made suspended, and Kueue lets it go",
            "install Kueue, or leave `queue` out",
        )
    else:
        yield unchecked(api.on, f"the LocalQueue {name!r}", answer)


def _state(queue: Mapping[str, Any], name: str) -> Found:
    policy = dig(queue, "spec", "stopPolicy")
    if policy not in (None, "None"):
        yield warn(
            "QUEUE-STOPPED",
            "queue",
            f"the LocalQueue {name!r} is stopped ({policy})",
            "it takes jobs and lets none go",
            "the job waits until stopPolicy is None again",
        )
    for condition in listed(dig(queue, "status", "conditions")):
        if condition.get("type") == "Active" and condition.get("status") == "False" and policy in (None, "None"):
            said = condition.get("message") or condition.get("reason", "")
            yield warn(
                "QUEUE-INACTIVE",
                "queue",
                f"the LocalQueue {name!r} lets no job go ({said})",
                "",
                "see its ClusterQueue: kubectl describe clusterqueue",
            )


def _nominal(api: KubeApi, version: str, queue: Mapping[str, Any], job: Job) -> Found:
    """Return whether the LocalQueue's ClusterQueue could ever admit the job."""
    name = dig(queue, "spec", "clusterQueue")
    if not name:
        return
    answer = api.ask("GET", cluster_path(KUEUE, version, "clusterqueues", str(name)))
    if answer.ok:
        yield from nominal_findings(answer.body, job.cluster)
    elif not answer.absent:  # a queue without a ClusterQueue is inactive, and said to be
        yield unchecked(api.on, f"the quota of the ClusterQueue {name!r}", answer)


def quota_findings(api: KubeApi, job: Job) -> Found:
    """What all pods take together, against each ResourceQuota: more than its limit is refused, more than is free
    is said."""
    answer = api.ask("GET", namespaced("", "v1", api.place.namespace, "resourcequotas"))
    if not answer.ok:
        yield unchecked(api.on, "quotas of the namespace", answer)
        return
    takes = pod_usage(job)
    for quota in answer.body.get("items", []):
        name = quota["metadata"]["name"]
        hard, used = quota.get("status", {}).get("hard") or quota["spec"].get("hard", {}), dig(quota, "status", "used")
        for resource, most in hard.items():
            if resource not in takes:
                continue
            limit, held = amount(most), amount((used or {}).get(resource, "0"))
            said = f"the job takes {takes[resource]:g} {resource}; the ResourceQuota {name!r} has {limit:g}"
            if takes[resource] > limit:
                yield refuse(
                    "QUOTA",
                    "workers",
                    said,
                    "pods beyond a quota are not made, and the job waits for them",
                    "take less, or have the quota raised",
                )
            elif takes[resource] > limit - held:
                yield warn(
                    "QUOTA-IN-USE",
                    "workers",
                    f"{said}, of which {held:g} are in use",
                    "",
                    "the job waits until others end",
                )


def pod_usage(job: Job) -> dict[str, float]:
    """All pods of a job, by the resource names of a quota."""
    cluster = job.cluster
    machines = [(1, cluster.head.cpu, cluster.head.memory, 0)]
    machines += [(group.count, group.cpu, group.memory, group.gpu) for group in cluster.workers]
    cpus = sum(count * quantity(cpu) for count, cpu, _, _ in machines)
    memory = sum(count * quantity(memory) for count, _, memory, _ in machines)
    gpus = float(sum(count * gpu for count, _, _, gpu in machines))
    whole_pods = float(sum(count for count, *_ in machines))
    return {
        "cpu": cpus,
        "requests.cpu": cpus,
        "limits.cpu": cpus,
        "memory": memory,
        "requests.memory": memory,
        "limits.memory": memory,
        f"requests.{GPU}": gpus,
        "pods": whole_pods,
        "count/pods": whole_pods,
    }
