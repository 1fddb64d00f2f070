"""Reasons why a job is or would be pending: its pods against quotas and queues, and the state of pods and Workloads.

Kueue gives each pod set (the head, a worker group) one flavor of each resource group, for all its pods at once, and
adds up what the pod sets take of a flavor (https://kueue.sigs.k8s.io, "ClusterQueue"). Labels and taints of flavors are
not compared: a job that is refused fits in no way, and a job that passes may still wait for nodes.
"""

import math
from collections.abc import Mapping, Sequence

from graftwork.cluster.jobs.models import Findings, Job, refuse, warn
from graftwork.cluster.kuberay.client import KubeApi, cluster_path, namespaced, unchecked
from graftwork.cluster.kuberay.object_view import KubeView, dig, listed
from graftwork.cluster.kuberay.pods import GPU
from graftwork.cluster.spec import ClusterSpec, quantity
from graftwork.planning.hardware import GIB

KUEUE = "kueue.x-k8s.io"
KUEUE_VERSIONS = ("v1beta2", "v1beta1")
"""Served since Kueue 0.14, and before."""


WAITS = frozenset({"", "New", "Initializing", "Waiting", "Retrying"})
USUAL = frozenset({"ContainerCreating", "PodInitializing"})
AT_MOST = 100
"""Limit of the waiting jobs whose reasons are looked up: one listing of pods and one of workloads."""
Objects = Sequence[KubeView]
Amounts = Mapping[str, float]


def reasons(api: KubeApi, jobs: Objects) -> dict[str, str]:
    """By RayJob's name, for those that wait; what we may not see, or what is no trouble, has none."""
    coming: dict[str, str] = {}
    for job in jobs:
        status = job.get("status", {})
        if status.get("jobDeploymentStatus", "") in WAITS and status.get("rayClusterName"):
            coming[str(status["rayClusterName"])] = str(job["metadata"]["name"])
    queued = [str(job["metadata"]["name"]) for job in jobs if dig(job, "spec", "suspend")]
    found: dict[str, str] = {}
    if coming:
        path = namespaced("", "v1", api.place.namespace, "pods")
        clusters = ",".join(list(coming)[:AT_MOST])
        for pod in _list_visible(api, path, f"ray.io/cluster in ({clusters})"):
            said = pod_trouble(pod)
            name = coming.get(str(dig(pod, "metadata", "labels", "ray.io/cluster")))
            if said and name is not None:
                found.setdefault(name, said)
    if queued:
        found |= _queue_reasons(api, frozenset(queued))
    return found


def pod_trouble(pod: KubeView) -> str:
    """What keeps a pod from running; empty where nothing does, or where it is only starting."""
    status = pod.get("status", {})
    for container in [*listed(status.get("initContainerStatuses")), *listed(status.get("containerStatuses"))]:
        reason = dig(container, "state", "waiting", "reason")
        if reason and reason not in USUAL:
            said = dig(container, "state", "waiting", "message") or ""
            return f"pod {pod['metadata']['name']}: {reason}: {str(said)[:300]}".rstrip(": ")
    for condition in listed(status.get("conditions")):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            reason, said = condition.get("reason", ""), str(condition.get("message", ""))[:300]
            return f"pod {pod['metadata']['name']}: {reason}: {said}"
    return ""


def _queue_reasons(api: KubeApi, names: frozenset[str]) -> dict[str, str]:
    """From the Workloads that Kueue makes of RayJobs."""
    found: dict[str, str] = {}
    for version in KUEUE_VERSIONS:
        for workload in _list_visible(api, namespaced(KUEUE, version, api.place.namespace, "workloads")):
            owners = [owner["name"] for owner in listed(dig(workload, "metadata", "ownerReferences"))]
            for condition in listed(dig(workload, "status", "conditions")):
                if condition.get("status") == "False" and condition.get("type") == "QuotaReserved":
                    said = f"Kueue: {condition.get('reason', '')}: {str(condition.get('message', ''))[:300]}"
                    found |= {owner: said for owner in owners if owner in names}
        if found:
            break
    return found


def _list_visible(api: KubeApi, path: str, selector: str = "") -> Objects:
    """What we may see of a kind; nothing where it is not served or not for us."""
    answer = api.ask("GET", path, query={"labelSelector": selector} if selector else {})
    return listed(answer.body.get("items")) if answer.ok else []


def nominal_findings(queue: KubeView, cluster: ClusterSpec) -> Findings:
    """Of a ClusterQueue object and the machines of a job."""
    name, pod_sets = str(dig(queue, "metadata", "name")), pod_sets_of(cluster)
    groups = listed(dig(queue, "spec", "resourceGroups"))
    covered = {resource for group in groups for resource in group.get("coveredResources", [])}
    lacking = sorted({resource for takes in pod_sets.values() for resource in takes} - covered)
    if lacking:
        yield refuse(
            "QUEUE-QUOTA",
            "queue",
            f"the ClusterQueue {name!r} has no {', '.join(lacking)}",
            "Kueue admits pods whose resources all have a quota",
            "another queue, or have the resource added to its flavors",
        )
        return
    for group in groups:
        flavors = {str(one.get("name")): _flavor_limits(queue, one) for one in listed(group.get("flavors"))}
        wanted = {
            owner: {key: value for key, value in takes.items() if key in group.get("coveredResources", [])}
            for owner, takes in pod_sets.items()
        }
        if not _fits_flavors(list(wanted.values()), list(flavors.values())):
            yield refuse(
                "QUEUE-QUOTA",
                "queue",
                f"the ClusterQueue {name!r} can never admit it: the job takes "
                f"{_describe_amounts(wanted)}; its flavors have {_describe_amounts(flavors)}",
                "all pods of a group get one flavor, within its nominalQuota and borrowingLimit",
                "fewer or smaller machines a group, or have the quota raised",
            )


def pod_sets_of(cluster: ClusterSpec) -> dict[str, Amounts]:
    """Return the resources of the head and of each worker group, all pods of a group together."""
    found: dict[str, Amounts] = {"head": {"cpu": quantity(cluster.head.cpu), "memory": quantity(cluster.head.memory)}}
    for group in cluster.workers:
        if group.count:
            gpus = {GPU: float(group.count * group.gpu)} if group.gpu else {}
            found[group.name] = {
                "cpu": group.count * quantity(group.cpu),
                "memory": group.count * quantity(group.memory),
                **gpus,
            }
    return found


def _flavor_limits(queue: KubeView, flavor: KubeView) -> Amounts:
    """Most that a job may get of a flavor: its quota, and what the queue may borrow within its cohort."""
    borrows = bool(dig(queue, "spec", "cohort") or dig(queue, "spec", "cohortName"))
    limits = {}
    for resource in listed(flavor.get("resources")):
        most = amount(str(resource.get("nominalQuota", "0")))
        if borrows:
            limit = resource.get("borrowingLimit")
            most += math.inf if limit is None else amount(str(limit))
        limits[str(resource.get("name"))] = most
    return limits


def _fits_flavors(wanted: Sequence[Amounts], flavors: Sequence[Amounts]) -> bool:
    """Return whether every pod set can get one flavor. Tries all ways: a RayJob has at most 8 pod sets."""
    if not wanted:
        return True
    takes, rest = wanted[0], wanted[1:]
    for index, has in enumerate(flavors):
        left = {key: has.get(key, 0.0) - value for key, value in takes.items()}
        if all(value >= 0 for value in left.values()):
            after = [*flavors[:index], {**has, **left}, *flavors[index + 1 :]]
            if _fits_flavors(rest, after):
                return True
    return False


def _describe_amounts(parts: Mapping[str, Amounts]) -> str:
    return "; ".join(
        f"{name} {', '.join(_amount(key, value) for key, value in takes.items())}" for name, takes in parts.items()
    )


def _amount(resource: str, value: float) -> str:
    return f"{value / GIB:g}Gi memory" if resource == "memory" else f"{value:g} {resource}"


def amount(text: str) -> float:
    """A quantity of a server, which may have an exponent or a suffix that specs do not take (`1e3`, `2Pi`)."""
    for suffix, factor in (("Pi", 2.0**50), ("Ei", 2.0**60), ("P", 1e15), ("E", 1e18)):
        if text.endswith(suffix) and text.removesuffix(suffix).replace(".", "").isdigit():
            return float(text.removesuffix(suffix)) * factor
    return float(text) if "e" in text or "E" in text else quantity(text)


def queue_findings(api: KubeApi, job: Job) -> Findings:
    """The LocalQueue is there, is open, and its ClusterQueue takes jobs."""
    name = job.cluster.queue
    if name is None:
        return
    for version in KUEUE_VERSIONS:
        answer = api.ask("GET", namespaced(KUEUE, version, api.place.namespace, "localqueues", name))
        if not answer.unserved:
            break
    if answer.ok:
        yield from _queue_state_findings(answer.body, name)
        owner = dig(answer.body, "spec", "clusterQueue")
        quota = api.ask("GET", cluster_path(KUEUE, version, "clusterqueues", str(owner))) if owner else None
        if quota is not None and quota.ok:
            yield from nominal_findings(quota.body, job.cluster)
        elif quota is not None and not quota.absent:  # a queue without a ClusterQueue is inactive, and reported so
            yield unchecked(api.on, f"the quota of the ClusterQueue {owner!r}", quota)
    elif answer.absent:
        listing = api.ask("GET", namespaced(KUEUE, version, api.place.namespace, "localqueues"))
        names = sorted(item["metadata"]["name"] for item in listing.body.get("items", [])) if listing.ok else []
        yield refuse(
            "QUEUE-ABSENT",
            "queue",
            f"there is no LocalQueue {name!r} in {api.place.namespace}",
            f"there are: {', '.join(names) or 'none'}",
            "set `queue` to one of these, or ask the cluster's administrator to create it",
        )
    elif answer.unserved:
        yield refuse(
            "QUEUE-NO-KUEUE",
            "queue",
            f"queue={name}, and Kueue is not installed in this cluster",
            "a job with a queue starts suspended until Kueue admits it",
            "install Kueue, or remove `queue` from cluster.yaml",
        )
    else:
        yield unchecked(api.on, f"the LocalQueue {name!r}", answer)


def _queue_state_findings(queue: KubeView, name: str) -> Findings:
    policy = dig(queue, "spec", "stopPolicy")
    if policy not in (None, "None"):
        yield warn(
            "QUEUE-STOPPED",
            "queue",
            f"the LocalQueue {name!r} is stopped ({policy})",
            "a stopped queue accepts jobs and admits none",
            "set stopPolicy: None, or another `queue`",
        )
    for condition in listed(dig(queue, "status", "conditions")):
        if condition.get("type") == "Active" and condition.get("status") == "False" and policy in (None, "None"):
            said = condition.get("message") or condition.get("reason", "")
            yield warn(
                "QUEUE-INACTIVE",
                "queue",
                f"the LocalQueue {name!r} admits no job ({said})",
                "an inactive queue admits no job",
                "kubectl describe clusterqueue, and activate the ClusterQueue of this queue",
            )


def quota_findings(api: KubeApi, job: Job) -> Findings:
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
            limit, in_use = amount(most), amount((used or {}).get(resource, "0"))
            said = f"the job takes {takes[resource]:g} {resource}; the ResourceQuota {name!r} has {limit:g}"
            if takes[resource] > limit:
                yield refuse(
                    "QUOTA",
                    "workers",
                    said,
                    "pods beyond a quota are not created, and the job waits for them",
                    "set fewer or smaller `workers`, or ask the administrator to raise the quota",
                )
            elif takes[resource] > limit - in_use:
                yield warn(
                    "QUOTA-IN-USE",
                    "workers",
                    f"{said}, of which {in_use:g} are in use",
                    "pods beyond a quota are not created until other pods end",
                    "wait until other jobs end, or set fewer `workers`",
                )


def pod_usage(job: Job) -> dict[str, float]:
    """Return the resources of all pods of a job, by the names of a quota."""
    cluster = job.cluster
    takes = {"cpu": cluster.cpus, "memory": cluster.memory_bytes, f"requests.{GPU}": cluster.gpus}
    takes |= {f"{kind}.{name}": takes[name] for kind in ("requests", "limits") for name in ("cpu", "memory")}
    takes |= dict.fromkeys(("pods", "count/pods"), float(1 + sum(group.count for group in cluster.workers)))
    return takes
