"""Checks of a live Kubernetes cluster: `live_findings` for one job, `diagnose` for the cluster itself.

`diagnose` checks operator, kinds, rights, names, room, stuck jobs and leftover clusters.
Both write nothing. Whatever they may not read becomes a W-NOT-CHECKED finding.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from graftwork.cluster.jobs.models import Finding, Job
from graftwork.cluster.kuberay.client import KubeApi, cluster_path, namespaced
from graftwork.cluster.kuberay.live_checks import (
    HELM,
    dry_run_findings,
    live_crd,
    name_findings,
    rights_findings,
    secret_findings,
    unchecked,
)
from graftwork.cluster.kuberay.object_view import Found, dig, refuse, warn
from graftwork.cluster.kuberay.pending_reasons import WAITS, reasons
from graftwork.cluster.kuberay.quota_checks import queue_findings, quota_findings

SILENT_S, STUCK_S, UNDELETED_S = 60.0, 900.0, 120.0
"""Limits for an operator that sets no status of a new RayJob, a job that waits, an object that is being deleted."""
OPERATOR = "app.kubernetes.io/name=kuberay-operator"
MADE_FOR = "ray.io/originated-from-cr-name"
Objects = Sequence[Mapping[str, Any]]


def live_findings(api: KubeApi, job: Job, objects: Sequence[Mapping[str, Any]]) -> list[Finding]:
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


def _stuck(api: KubeApi, ours: Objects) -> Found:
    """Find our jobs without a status, jobs that wait long, and deleted jobs that remain."""
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


def _leaked(api: KubeApi, selector: str, ours: Objects) -> Found:
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


def age(stamp: str) -> float:
    """Seconds since a time of the API server's."""
    return time.time() - datetime.fromisoformat(stamp).timestamp()
