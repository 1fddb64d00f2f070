"""Objects of a job for KubeRay: RayJob, RayService with its Serve config and disruption budget, names.

Ray Serve creates an application again when its `args`, import path or code change: engines start again, next to the old
ones on the same cluster. It passes changes under `deployments` to running replicas. So `deployments` has all that
changes from day to day, and `args` has what an engine is made of (Ray 2.60, serve/_private/application_state.py).
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.jobs.driver import LIMIT_GRACE_S
from graftwork.cluster.jobs.models import Attempt, Finding, Job, refuse
from graftwork.cluster.kuberay.labels import (
    NAME_LABEL,
    NODE_TYPE_LABEL,
    PLAN_ANNOTATION,
    label_value,
    object_labels,
    pod_labels,
)
from graftwork.cluster.kuberay.object_view import KubeObject
from graftwork.cluster.kuberay.pods import CLOSED, GRACE_S, PodSettings, head_template, worker_template
from graftwork.cluster.session import JOB
from graftwork.cluster.spec import ClusterSpec, WorkerSpec, quantity
from graftwork.config import canonical_json
from graftwork.errors import ConfigError
from graftwork.planning.hardware import resolved_count

# Names of objects and their lengths: an attempt's RayJob has the attempt's id.


MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
"""Longest names that KubeRay 1.7 takes (its controllers/ray/utils/constant.go): the pods' names append to them."""
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def check_name(kind: str, name: str) -> list[Finding]:
    """Findings on the name of an object of KubeRay's."""
    found, most = [], MAX_NAME[kind]
    if len(name) > most:
        found.append(
            refuse(
                "NAME-TOO-LONG",
                "metadata.name",
                f"{name!r} has {len(name)} characters, {len(name) - most} too many",
                f"a {kind} has at most {most}, since the names of its pods begin with it",
                f"shorten `name` by {len(name) - most}",
            )
        )
    if not DNS_1035.fullmatch(name):
        corrected = re.sub(r"^[^a-z]+|-+$", "", re.sub(r"[^-a-z0-9]", "-", name.lower()))
        found.append(
            refuse(
                "NAME-FORM",
                "metadata.name",
                repr(name),
                "a letter first, then small letters, digits and hyphens, no hyphen last (RFC 1035)",
                "rename the job, e.g. " + (corrected or "run-1"),
            )
        )
    return found


# The RayCluster within a RayJob or a RayService: a head that takes no work, groups of workers, who may speak to it.


API = "ray.io/v1"
IDLE_S = 300
"""A worker that an autoscaler added goes after so long without work."""
ROCKSDB_SIZE = "1Gi"


def ray_cluster_spec(settings: PodSettings, *, autoscales: bool) -> KubeObject:
    """Return the `rayClusterSpec` of a RayJob or the `rayClusterConfig` of a RayService."""
    cluster = settings.cluster
    groups = [
        {
            "groupName": group.name,
            "replicas": group.count,
            "minReplicas": group.count,
            "maxReplicas": group.max_count if autoscales and group.max_count is not None else group.count,
            "rayStartParams": {},
            "template": worker_template(settings, group),
        }
        for group in cluster.workers
    ]
    auth: KubeObject = {"mode": cluster.auth.mode}
    if cluster.auth.secret is not None:
        auth["secretName"] = cluster.auth.secret
    spec: KubeObject = {
        "rayVersion": cluster.ray_version,
        "authOptions": auth,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0"},
            "template": head_template(settings, autoscales=autoscales),
        },
        "workerGroupSpecs": groups,
    }
    if cluster.gcs.backend == "rocksdb":
        spec["gcsFaultToleranceOptions"] = {"backend": "rocksdb", "storage": {"size": ROCKSDB_SIZE}}
    elif cluster.gcs.backend == "redis":
        options: KubeObject = {"backend": "redis", "redisAddress": cluster.gcs.redis_address}
        if cluster.gcs.redis_secret is not None:
            reference = {"name": cluster.gcs.redis_secret, "key": "password"}
            options["redisPassword"] = {"valueFrom": {"secretKeyRef": reference}}
        spec["gcsFaultToleranceOptions"] = options
    if autoscales:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_S,
            "securityContext": dict(CLOSED),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    return spec


def has_autoscaling(cluster: ClusterSpec) -> bool:
    """Return whether a worker group may grow beyond its first size."""
    return any(group.max_count is not None and group.max_count > group.count for group in cluster.workers)


# An attempt as a RayJob: submitted by the operator itself, gone after its end, ended from outside where its driver
# fails to end it.


BACKSTOP_S = 60
"""The operator ends a job so long after its driver should have."""


def build_rayjob(attempt: Attempt, namespace: str, wheel_uri: str | None) -> KubeObject:
    """The RayJob of an attempt. Equal attempts give equal objects; `graftwork.dev/plan` has their hash."""
    job, cluster = attempt.job, attempt.job.cluster
    settings = PodSettings(
        cluster, pod_labels(cluster, job.name, job.job_id, job.kind), job.root, wheel_uri, serves=False
    )
    spec: KubeObject = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"python -m graftwork.cluster.jobs.driver {job.root} {job.job_id} {attempt.number} {JOB}",
        "jobId": attempt.id,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": math.ceil(cluster.ttl_s),
        "preRunningDeadlineSeconds": math.ceil(cluster.limits.pending),
        "submitterConfig": {"backoffLimit": 0},
        "backoffLimit": int(cluster.retry.max_attempts > 1 and any(group.spot for group in cluster.workers)),
        "rayClusterSpec": ray_cluster_spec(settings, autoscales=False),
    }
    if cluster.limits.deadline is not None:  # the operator counts from the first pod, the driver from its own start
        longest_s = cluster.limits.pending + cluster.limits.deadline + LIMIT_GRACE_S
        spec["activeDeadlineSeconds"] = math.ceil(longest_s) + BACKSTOP_S
    if cluster.queue is not None:
        spec["suspend"] = True  # Kueue lets it go
    labels = object_labels(cluster, job.name, job.job_id, job.kind, attempt.id)
    return with_plan(
        {
            "apiVersion": API,
            "kind": "RayJob",
            "metadata": {"name": attempt.id, "namespace": namespace, "labels": labels},
            "spec": spec,
        }
    )


def with_plan(made: KubeObject) -> KubeObject:
    """Return a copy of the object with its hash among the annotations.

    The hash is of what is asked for: without itself, and without what a queue or a person changes afterwards.
    """
    planned: KubeObject = json.loads(json.dumps(made))
    metadata = {key: value for key, value in planned["metadata"].items() if key in ("name", "namespace", "labels")}
    spec = {key: value for key, value in planned["spec"].items() if key != "suspend"}
    plan = hashlib.sha256(canonical_json([planned["kind"], metadata, spec]).encode()).hexdigest()[:16]
    planned["metadata"].setdefault("annotations", {})[PLAN_ANNOTATION] = plan
    return planned


# A served endpoint as a RayService. What changes often (adapters, arms, weights) is in its `user_config` or in the
# registry: a change of `serveConfigV2` alone is taken up by the replicas, a change of the rest makes a second cluster.


MARGIN_S = 60
"""Between the longest request and the deletion of the cluster that an upgrade replaced."""


def service_objects(job: Job, namespace: str, wheel_uri: str | None) -> list[KubeObject]:
    """Return the RayService of a serve job and its disruption budget. Raises ConfigError for one without a token."""
    service = build_rayservice(job, namespace, serve_config(job.spec), wheel_uri)
    return [service, build_disruption_budget(job, namespace)]


def build_rayservice(job: Job, namespace: str, config: Mapping[str, Any], wheel_uri: str | None = None) -> KubeObject:
    """The RayService of a serve job, named by the job's name: the next version of its spec is the same service."""
    cluster = job.cluster
    settings = PodSettings(
        cluster,
        pod_labels(cluster, job.name, None, job.kind),
        job.root,
        wheel_uri,
        serves=True,
        grace_s=max(GRACE_S, termination_grace_s(job.spec)),
    )
    spec = {
        "serveConfigV2": json.dumps(config, sort_keys=True, ensure_ascii=False, indent=1),
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterDeletionDelaySeconds": math.ceil(job.spec["request_timeout_s"]) + MARGIN_S,
        "excludeHeadPodFromServeSvc": True,
        "serveService": {"spec": {"type": "ClusterIP"}},
        "rayClusterConfig": ray_cluster_spec(settings, autoscales=has_autoscaling(cluster)),
    }
    labels = object_labels(cluster, job.name, job.job_id, job.kind)
    return with_plan(
        {
            "apiVersion": API,
            "kind": "RayService",
            "metadata": {"name": job.name, "namespace": namespace, "labels": labels},
            "spec": spec,
        }
    )


ROUNDING = 1e-9
"""0.6 CPUs have room for 3 replicas of 0.2, which 0.6 / 0.2 = 2.9999999999999996 does not say."""


def build_disruption_budget(job: Job, namespace: str) -> KubeObject:
    """Return the PodDisruptionBudget of a serve job: a drain of nodes evicts its workers one at a time.

    `minAvailable` is a number: `maxUnavailable` and percentages need the scale subresource of the pods' owner, which
    RayCluster lacks, and every eviction would be refused (kuberay#2662). The head is left out, since a budget for one
    pod blocks the drain of its node. A worker without a replica is not ready: it may always be evicted.
    """
    return with_plan(
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {
                "name": job.name,
                "namespace": namespace,
                "labels": object_labels(job.cluster, job.name, job.job_id, job.kind),
            },
            "spec": {
                "minAvailable": max(0, fewest_serving_workers(job) - 1),
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": {NAME_LABEL: label_value(job.name), NODE_TYPE_LABEL: "worker"}},
            },
        }
    )


def fewest_serving_workers(job: Job) -> int:
    """Return the number of workers that have an engine replica however Serve places them, at the least load."""
    spec, groups = job.spec, job.cluster.workers
    replicas: int = spec["num_replicas"] if spec.get("autoscaling") is None else spec["autoscaling"]["min_replicas"]
    per_worker = max([1, *(_replicas_that_fit(spec, group) for group in groups)])
    most_workers = sum(group.max_count or group.count for group in groups)
    return min(most_workers, math.ceil(replicas / per_worker))


def _replicas_that_fit(spec: Mapping[str, Any], group: WorkerSpec) -> int:
    by_cpu, gpus = quantity(group.cpu) / spec["num_cpus"], resolved_count(spec["num_gpus"])
    return int((min(by_cpu, group.gpu / gpus) if gpus else by_cpu) + ROUNDING)


LIVE = ("adapters", "arms", "limits", "experiments")
"""Keys of a serve spec that the ingress takes while it serves."""
SCALE = ("num_replicas", "autoscaling", "max_ongoing_requests", "graceful_shutdown_timeout_s")
"""Keys that Serve itself takes without a restart of what runs; but autoscaling in place of num_replicas, or back."""
SERVE_HOST, SERVE_PORT = "0.0.0.0", 8000
"""Where each pod's proxy listens: KubeRay's serve Service and its probes go to this port."""
IMPORT_PATH = "graftwork.serving.deploy:app"
INGRESS_PER_ENGINE = 4
"""Requests that the ingress holds for each that an engine replica does."""


def serve_config(spec: Mapping[str, Any], working_dir: str | None = None) -> KubeObject:
    """The config of a serve spec (its JSON dump). Equal specs give equal configs.

    working_dir: URI of a zip with the code, where the image has none; other code is another application.
    Raises ConfigError where the spec names no keys: a cluster's network is open to others.
    """
    if not spec.get("token_env"):
        raise ConfigError(
            "token_env",
            "none",
            "an endpoint on a cluster answers nobody without a key",
            "set token_env to a variable that a Secret fills: secret_env of the cluster",
        )
    shared = {"graceful_shutdown_timeout_s": spec["graceful_shutdown_timeout_s"]}
    engine = {"name": "engine", "max_ongoing_requests": spec["max_ongoing_requests"], **shared}
    if spec.get("autoscaling") is None:
        engine["num_replicas"] = spec["num_replicas"]
    else:
        engine |= {"num_replicas": "auto", "autoscaling_config": dict(spec["autoscaling"])}
    ingress = {  # it alone takes what is live, and passes it to the engines
        "name": "ingress",
        "max_ongoing_requests": INGRESS_PER_ENGINE * spec["max_ongoing_requests"],
        **shared,
        "user_config": {key: spec[key] for key in LIVE},
    }
    http_options = {"host": SERVE_HOST, "port": SERVE_PORT}
    engine_args = {key: value for key, value in spec.items() if key not in (*LIVE, *SCALE)} | http_options
    application: KubeObject = {
        "name": spec["name"],
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"spec": engine_args},
        "deployments": [engine, ingress],
    }
    if working_dir is not None:
        application["runtime_env"] = {"working_dir": working_dir}
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options,
        "applications": [application],
    }


def termination_grace_s(spec: Mapping[str, Any]) -> int:
    """What a pod needs between its notice and its end: a replica's own time to finish, and a margin for Serve."""
    return int(spec["graceful_shutdown_timeout_s"]) + 15
