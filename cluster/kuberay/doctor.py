"""What is wrong with a cluster itself, whatever the job: KubeRay, rights, names, room; jobs that hang, clusters left.

Reads alone; what it may not read it says.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from graftwork.cluster.backend import Finding, Job
from graftwork.cluster.kuberay.api import KubeApi, cluster_path, namespaced
from graftwork.cluster.kuberay.findings import Found, dig, refuse, warn
from graftwork.cluster.kuberay.held import WAITS, reasons
from graftwork.cluster.kuberay.live import HELM, live_crd, rights_findings
from graftwork.cluster.kuberay.live_names import name_findings, secret_findings, unchecked
from graftwork.cluster.kuberay.live_room import queue_findings, quota_findings

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
        yield refuse("OPERATOR-DOWN", api.on, f"kuberay-operator in {item['namespace']} has no pod that is ready", "",
                     f"kubectl describe deployment -n {item['namespace']} {item['name']}")  # fmt: skip


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
                yield warn("JOB-UNDELETED", name, f"deleted, and held by its finalizers {by}", "",
                           "see that KubeRay's operator runs")  # fmt: skip
        elif dig(job, "spec", "suspend"):
            if age_s > STUCK_S:
                yield warn("JOB-QUEUED", name, f"it waits in its queue for {age_s / 60:.0f} min{why}", "",
                           "kubectl describe localqueue; another queue or a higher priority")  # fmt: skip
        elif not phase and age_s > SILENT_S:
            yield refuse("OPERATOR-SILENT", name, f"KubeRay's operator has said nothing of it for {age_s:.0f} s",
                         "the operator watches this namespace", "see that it runs, and its watchNamespace")  # fmt: skip
        elif phase in WAITS and age_s > STUCK_S:
            yield warn("JOB-STUCK", name, f"{phase} for {age_s / 60:.0f} min{why}", "",
                       "graftwork jobs cancel, mend it, resubmit")  # fmt: skip


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
            yield warn("CLUSTER-LEFT", name, f"a RayCluster of the RayJob {labels.get(MADE_FOR)}, which is gone",
                       "it holds machines", f"kubectl delete raycluster {name} -n {api.place.namespace}")  # fmt: skip


def age(stamp: str) -> float:
    """Seconds since a time of the API server's."""
    return time.time() - datetime.fromisoformat(stamp).timestamp()
