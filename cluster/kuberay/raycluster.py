"""The RayCluster within a RayJob or a RayService: a head that takes no work, groups of workers, who may speak to it."""

from typing import Any

from graftwork.cluster.kuberay.labels import object_labels, pod_labels
from graftwork.cluster.kuberay.pods import CLOSED, PodFacts, head_template, worker_template
from graftwork.cluster.spec import ClusterSpec, GcsSpec, WorkerSpec

API = "ray.io/v1"
IDLE_S = 300
"""A worker that an autoscaler added goes after so long without work."""
ROCKSDB_SIZE = "1Gi"


def build_raycluster(cluster: ClusterSpec, name: str, namespace: str) -> dict[str, Any]:
    """A RayCluster of its own, for sessions that outlive a job."""
    labels = object_labels(cluster, name, name, "session")
    facts = PodFacts(cluster, pod_labels(cluster, name, name, "session"), cluster.storage.uri or "", None, serves=False)
    return {
        "apiVersion": API, "kind": "RayCluster",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": cluster_part(facts, autoscales=grows(cluster)),
    }  # fmt: skip


def cluster_part(facts: PodFacts, *, autoscales: bool) -> dict[str, Any]:
    """What RayJob has as `rayClusterSpec` and RayService as `rayClusterConfig`."""
    cluster = facts.cluster
    auth: dict[str, Any] = {"mode": cluster.auth.mode}
    if cluster.auth.secret is not None:
        auth["secretName"] = cluster.auth.secret
    part: dict[str, Any] = {
        "rayVersion": cluster.ray_version,
        "authOptions": auth,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0"},
            "template": head_template(facts, autoscales=autoscales),
        },
        "workerGroupSpecs": [_group(facts, group, autoscales=autoscales) for group in cluster.workers],
    }
    if cluster.gcs.backend != "none":
        part["gcsFaultToleranceOptions"] = _fault_tolerance(cluster.gcs)
    if autoscales:
        part["enableInTreeAutoscaling"] = True
        part["autoscalerOptions"] = {
            "version": "v2", "idleTimeoutSeconds": IDLE_S, "securityContext": dict(CLOSED),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }  # fmt: skip
    return part


def grows(cluster: ClusterSpec) -> bool:
    """Whether a group may have more machines than it starts with."""
    return any(group.max_count is not None and group.max_count > group.count for group in cluster.workers)


def _group(facts: PodFacts, group: WorkerSpec, *, autoscales: bool) -> dict[str, Any]:
    most = group.max_count if autoscales and group.max_count is not None else group.count
    return {
        "groupName": group.name, "replicas": group.count, "minReplicas": group.count, "maxReplicas": most,
        "rayStartParams": {}, "template": worker_template(facts, group),
    }  # fmt: skip


def _fault_tolerance(gcs: GcsSpec) -> dict[str, Any]:
    if gcs.backend == "rocksdb":
        return {"backend": "rocksdb", "storage": {"size": ROCKSDB_SIZE}}
    options: dict[str, Any] = {"backend": "redis", "redisAddress": gcs.redis_address}
    if gcs.redis_secret is not None:
        options["redisPassword"] = {"valueFrom": {"secretKeyRef": {"name": gcs.redis_secret, "key": "password"}}}
    return options
