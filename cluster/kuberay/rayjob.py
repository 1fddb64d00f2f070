"""An attempt as a RayJob: submitted by the operator itself, gone after its end, ended from outside where its driver
fails to end it."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.address import JOB
from graftwork.cluster.backend import Attempt
from graftwork.cluster.driver.run import LIMIT_GRACE_S
from graftwork.cluster.kuberay.labels import PLAN, object_labels, pod_labels
from graftwork.cluster.kuberay.pods import PodFacts
from graftwork.cluster.kuberay.raycluster import API, cluster_part
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import canonical_json

BACKSTOP_S = 60
"""The operator ends a job so long after its driver should have."""


def build_rayjob(attempt: Attempt, namespace: str, wheel_uri: str | None) -> dict[str, Any]:
    """The RayJob of an attempt. Equal attempts give equal objects; `graftwork.dev/plan` has their hash."""
    job, cluster = attempt.job, attempt.job.cluster
    facts = PodFacts(cluster, pod_labels(cluster, job.name, job.job_id, job.kind), job.root, wheel_uri, serves=False)
    spec: dict[str, Any] = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"python -m graftwork.cluster.driver {job.root} {job.job_id} {attempt.number} {JOB}",
        "jobId": attempt.id,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": math.ceil(cluster.ttl_s),
        "preRunningDeadlineSeconds": math.ceil(cluster.limits.pending),
        "submitterConfig": {"backoffLimit": 0},
        "backoffLimit": int(cluster.retry.max_attempts > 1 and any(group.spot for group in cluster.workers)),
        "rayClusterSpec": cluster_part(facts, autoscales=False),
    }
    backstop = backstop_s(cluster)
    if backstop is not None:
        spec["activeDeadlineSeconds"] = backstop
    if cluster.queue is not None:
        spec["suspend"] = True  # Kueue lets it go
    labels = object_labels(cluster, job.name, job.job_id, job.kind, attempt.id)
    return with_plan({
        "apiVersion": API, "kind": "RayJob",
        "metadata": {"name": attempt.id, "namespace": namespace, "labels": labels}, "spec": spec,
    })  # fmt: skip


def backstop_s(cluster: ClusterSpec) -> int | None:
    """activeDeadlineSeconds. The operator counts from the first pod, the driver's deadline from the driver's start."""
    limits = cluster.limits
    if limits.deadline is None:
        return None
    return math.ceil(limits.pending + limits.deadline + LIMIT_GRACE_S) + BACKSTOP_S


def with_plan(made: dict[str, Any]) -> dict[str, Any]:
    """The object, no part of it shared, with its own hash among its annotations."""
    whole: dict[str, Any] = json.loads(json.dumps(made))
    whole["metadata"].setdefault("annotations", {})[PLAN] = plan_hash(whole)
    return whole


def plan_hash(made: Mapping[str, Any]) -> str:
    """sha256 of what is asked for, the hash itself and what a queue or a person changes afterwards left out."""
    metadata = {key: value for key, value in made["metadata"].items() if key in ("name", "namespace", "labels")}
    spec = {key: value for key, value in made["spec"].items() if key != "suspend"}
    return hashlib.sha256(canonical_json([made["kind"], metadata, spec]).encode()).hexdigest()[:16]
