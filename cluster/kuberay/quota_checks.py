"""Checks that there is room for a job: its Kueue LocalQueue and ClusterQueue, and the namespace's ResourceQuotas."""

from collections.abc import Mapping
from typing import Any

from graftwork.cluster.jobs.models import Job
from graftwork.cluster.kuberay.client import KubeApi, cluster_path, namespaced
from graftwork.cluster.kuberay.live_checks import unchecked
from graftwork.cluster.kuberay.object_view import Found, dig, listed, refuse, warn
from graftwork.cluster.kuberay.pending_reasons import KUEUE, KUEUE_VERSIONS, amount, nominal_findings
from graftwork.cluster.kuberay.pods import GPU
from graftwork.cluster.spec import quantity


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


def _state(queue: Mapping[str, Any], name: str) -> Found:
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
                    "pods beyond a quota are not created, and the job waits for them",
                    "set fewer or smaller `workers`, or ask the administrator to raise the quota",
                )
            elif takes[resource] > limit - held:
                yield warn(
                    "QUOTA-IN-USE",
                    "workers",
                    f"{said}, of which {held:g} are in use",
                    "pods beyond a quota are not created until other pods end",
                    "wait until other jobs end, or set fewer `workers`",
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
