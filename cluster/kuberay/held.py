"""Why a RayJob does not run yet, in words: its pods cannot start (image, Secret, no machine), or its queue waits."""

from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.cluster.kuberay.api import KubeApi, namespaced
from graftwork.cluster.kuberay.findings import dig, listed
from graftwork.cluster.kuberay.live_room import KUEUE, KUEUE_VERSIONS

WAITS = frozenset({"", "New", "Initializing", "Waiting", "Retrying"})
USUAL = frozenset({"ContainerCreating", "PodInitializing"})
AT_MOST = 100
"""Of so many waiting jobs the reasons are looked up: one listing of pods and one of workloads."""
Objects = Sequence[Mapping[str, Any]]


def reasons(api: KubeApi, jobs: Objects) -> dict[str, str]:
    """By RayJob's name, for those that wait; what we may not see, or what is no trouble, has none."""
    coming = {str(dig(job, "status", "rayClusterName")): str(job["metadata"]["name"]) for job in jobs if _comes_up(job)}
    queued = [str(job["metadata"]["name"]) for job in jobs if dig(job, "spec", "suspend")]
    found: dict[str, str] = {}
    if coming:
        path = namespaced("", "v1", api.place.namespace, "pods")
        clusters = ",".join(list(coming)[:AT_MOST])
        for pod in _seen(api, path, f"ray.io/cluster in ({clusters})"):
            said = pod_trouble(pod)
            name = coming.get(str(dig(pod, "metadata", "labels", "ray.io/cluster")))
            if said and name is not None:
                found.setdefault(name, said)
    if queued:
        found |= _queued(api, frozenset(queued))
    return found


def pod_trouble(pod: Mapping[str, Any]) -> str:
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


def _queued(api: KubeApi, names: frozenset[str]) -> dict[str, str]:
    """From the Workloads that Kueue makes of RayJobs."""
    found: dict[str, str] = {}
    for version in KUEUE_VERSIONS:
        for workload in _seen(api, namespaced(KUEUE, version, api.place.namespace, "workloads")):
            owners = [owner["name"] for owner in listed(dig(workload, "metadata", "ownerReferences"))]
            for condition in listed(dig(workload, "status", "conditions")):
                if condition.get("status") == "False" and condition.get("type") == "QuotaReserved":
                    said = f"Kueue: {condition.get('reason', '')}: {str(condition.get('message', ''))[:300]}"
                    found |= {owner: said for owner in owners if owner in names}
        if found:
            break
    return found


def _seen(api: KubeApi, path: str, selector: str = "") -> Objects:
    """What we may see of a kind; nothing where it is not served or not for us."""
    answer = api.ask("GET", path, query={"labelSelector": selector} if selector else {})
    return listed(answer.body.get("items")) if answer.ok else []


def _comes_up(job: Mapping[str, Any]) -> bool:
    status = job.get("status", {})
    return status.get("jobDeploymentStatus", "") in WAITS and bool(status.get("rayClusterName"))
