"""A served endpoint as a RayService. What changes often (adapters, arms, weights) is in its `user_config` or in the
registry: a change of `serveConfigV2` alone is taken up by the replicas, a change of the rest makes a second cluster."""

import math
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.backend import Job
from graftwork.cluster.kuberay.labels import NAME, object_labels, pod_labels
from graftwork.cluster.kuberay.names import label_value
from graftwork.cluster.kuberay.pods import GRACE_S, PodFacts
from graftwork.cluster.kuberay.raycluster import API, cluster_part, grows
from graftwork.cluster.kuberay.rayjob import with_plan
from graftwork.cluster.kuberay.serve_config import config_text, serve_config, termination_grace_s

LONGEST_REQUEST_S = 600.0
"""Where the spec names none (`request_timeout_s`)."""
MARGIN_S = 60


def service_objects(job: Job, namespace: str, wheel_uri: str | None) -> list[dict[str, Any]]:
    """All that a serve job is on Kubernetes. Raises ConfigError for an endpoint that would be open to anybody."""
    made = build_rayservice(job, namespace, serve_config(job.spec), wheel_uri)
    machines = sum(group.max_count or group.count for group in job.cluster.workers)
    return [made, build_disruption_budget(job, namespace)] if machines > 1 else [made]  # one alone is not guarded by it


def build_rayservice(
    job: Job, namespace: str, config: Mapping[str, Any], wheel_uri: str | None = None
) -> dict[str, Any]:
    """The RayService of a serve job, named by the job's name: the next version of its spec is the same service."""
    cluster = job.cluster
    timeout_s = {"graceful_shutdown_timeout_s": 0, **job.spec}
    facts = PodFacts(cluster, pod_labels(cluster, job.name, job.name, job.kind), job.root, wheel_uri, serves=True,
                     grace_s=max(GRACE_S, termination_grace_s(timeout_s)))  # fmt: skip
    longest = float(job.spec.get("request_timeout_s", LONGEST_REQUEST_S))
    spec = {
        "serveConfigV2": config_text(config),
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterDeletionDelaySeconds": math.ceil(longest) + MARGIN_S,
        "excludeHeadPodFromServeSvc": True,
        "serveService": {"spec": {"type": "ClusterIP"}},
        "rayClusterConfig": cluster_part(facts, autoscales=grows(cluster)),
    }
    labels = object_labels(cluster, job.name, job.job_id, job.kind)
    return with_plan({
        "apiVersion": API, "kind": "RayService",
        "metadata": {"name": job.name, "namespace": namespace, "labels": labels}, "spec": spec,
    })  # fmt: skip


def build_disruption_budget(job: Job, namespace: str) -> dict[str, Any]:
    """Lets nodes be emptied one pod of the service at a time."""
    selector = {NAME: label_value(job.name)}
    return {
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": {"name": job.name, "namespace": namespace,
                     "labels": object_labels(job.cluster, job.name, job.job_id, job.kind)},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector}},
    }  # fmt: skip
