"""Objects of a job for KubeRay: RayJob, RayService with its Serve config, labels and names.

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
from graftwork.cluster.kuberay.object_view import KubeObject
from graftwork.cluster.kuberay.pods import CLOSED, GRACE_S, PodFacts, head_template, worker_template
from graftwork.cluster.session import JOB
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import canonical_json
from graftwork.errors import ConfigError

# Labels of the objects: whose they are, which queue they wait in, which scheduler places all of their pods or none.


JOB_LABEL, ATTEMPT, NAME, PLAN = (f"graftwork.dev/{word}" for word in ("job", "attempt", "name", "plan"))
"""Job id, attempt id and name are labels; the plan's hash is an annotation."""
KUEUE_QUEUE, KUEUE_PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
VOLCANO_QUEUE, VOLCANO_PRIORITY = "volcano.sh/queue-name", "ray.io/priority-class-name"
KAI_QUEUE = "kai.scheduler/queue"
YUNIKORN_APP, YUNIKORN_QUEUE = "yunikorn.apache.org/app-id", "yunikorn.apache.org/queue"
GANG = "ray.io/gang-scheduling-enabled"
"""KubeRay's own; its presence alone makes YuniKorn's task groups. The other names above are each scheduler's."""
GANG_QUEUES = {"volcano": VOLCANO_QUEUE, "kai": KAI_QUEUE, "yunikorn": YUNIKORN_QUEUE}


def object_labels(
    cluster: ClusterSpec, name: str, job_id: str, app: str, attempt_id: str | None = None
) -> dict[str, str]:
    """Of a RayJob or RayService; the operator hands the queues' on to the pods."""
    own = {
        **cluster.labels,
        "app.kubernetes.io/name": "graftwork",
        "app.kubernetes.io/instance": label_value(name),
        "app.kubernetes.io/component": app,
        "app.kubernetes.io/managed-by": "graftwork",
        JOB_LABEL: label_value(job_id),
        NAME: label_value(name),
    }
    if attempt_id is not None:
        own[ATTEMPT] = label_value(attempt_id)
    queue, gang_queue = cluster.queue, cluster.gang_queue
    if queue is not None:
        own |= {KUEUE_QUEUE: queue, **({KUEUE_PRIORITY: cluster.priority} if cluster.priority else {})}
    if cluster.gang == "yunikorn":
        own |= {GANG: "true", YUNIKORN_APP: attempt_id or name}
    if cluster.gang != "none" and gang_queue:
        own[GANG_QUEUES[cluster.gang]] = gang_queue
    if cluster.gang == "volcano" and cluster.priority and queue is None:
        own[VOLCANO_PRIORITY] = cluster.priority
    return own


def pod_labels(cluster: ClusterSpec, name: str, job_id: str, app: str) -> dict[str, str]:
    """Of head and workers. `app.kubernetes.io/name` is left to the operator, whose services select by it."""
    return {
        **cluster.labels,
        "app.kubernetes.io/component": app,
        "app.kubernetes.io/part-of": "graftwork",
        JOB_LABEL: label_value(job_id),
        NAME: label_value(name),
    }


# Names of objects and their lengths: an attempt's RayJob has the attempt's id.


MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
"""Longest names that KubeRay 1.7 takes (its controllers/ray/utils/constant.go): the pods' names append to them."""
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
MAX_LABEL = 63


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


def label_value(text: str) -> str:
    """As much of a text as a label's value holds."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:MAX_LABEL].strip("-_.")


# The RayCluster within a RayJob or a RayService: a head that takes no work, groups of workers, who may speak to it.


API = "ray.io/v1"
IDLE_S = 300
"""A worker that an autoscaler added goes after so long without work."""
ROCKSDB_SIZE = "1Gi"


def cluster_part(facts: PodFacts, *, autoscales: bool) -> KubeObject:
    """What RayJob has as `rayClusterSpec` and RayService as `rayClusterConfig`."""
    cluster = facts.cluster
    groups = [
        {
            "groupName": group.name,
            "replicas": group.count,
            "minReplicas": group.count,
            "maxReplicas": group.max_count if autoscales and group.max_count is not None else group.count,
            "rayStartParams": {},
            "template": worker_template(facts, group),
        }
        for group in cluster.workers
    ]
    auth: KubeObject = {"mode": cluster.auth.mode}
    if cluster.auth.secret is not None:
        auth["secretName"] = cluster.auth.secret
    part: KubeObject = {
        "rayVersion": cluster.ray_version,
        "authOptions": auth,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0"},
            "template": head_template(facts, autoscales=autoscales),
        },
        "workerGroupSpecs": groups,
    }
    if cluster.gcs.backend == "rocksdb":
        part["gcsFaultToleranceOptions"] = {"backend": "rocksdb", "storage": {"size": ROCKSDB_SIZE}}
    elif cluster.gcs.backend == "redis":
        options: KubeObject = {"backend": "redis", "redisAddress": cluster.gcs.redis_address}
        if cluster.gcs.redis_secret is not None:
            reference = {"name": cluster.gcs.redis_secret, "key": "password"}
            options["redisPassword"] = {"valueFrom": {"secretKeyRef": reference}}
        part["gcsFaultToleranceOptions"] = options
    if autoscales:
        part["enableInTreeAutoscaling"] = True
        part["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_S,
            "securityContext": dict(CLOSED),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    return part


def grows(cluster: ClusterSpec) -> bool:
    """Whether a group may have more machines than it starts with."""
    return any(group.max_count is not None and group.max_count > group.count for group in cluster.workers)


# An attempt as a RayJob: submitted by the operator itself, gone after its end, ended from outside where its driver
# fails to end it.


BACKSTOP_S = 60
"""The operator ends a job so long after its driver should have."""


def build_rayjob(attempt: Attempt, namespace: str, wheel_uri: str | None) -> KubeObject:
    """The RayJob of an attempt. Equal attempts give equal objects; `graftwork.dev/plan` has their hash."""
    job, cluster = attempt.job, attempt.job.cluster
    facts = PodFacts(cluster, pod_labels(cluster, job.name, job.job_id, job.kind), job.root, wheel_uri, serves=False)
    spec: KubeObject = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"python -m graftwork.cluster.jobs.driver {job.root} {job.job_id} {attempt.number} {JOB}",
        "jobId": attempt.id,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": math.ceil(cluster.ttl_s),
        "preRunningDeadlineSeconds": math.ceil(cluster.limits.pending),
        "submitterConfig": {"backoffLimit": 0},
        "backoffLimit": int(cluster.retry.max_attempts > 1 and any(group.spot for group in cluster.workers)),
        "rayClusterSpec": cluster_part(facts, autoscales=False),
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
    whole: KubeObject = json.loads(json.dumps(made))
    metadata = {key: value for key, value in whole["metadata"].items() if key in ("name", "namespace", "labels")}
    spec = {key: value for key, value in whole["spec"].items() if key != "suspend"}
    plan = hashlib.sha256(canonical_json([whole["kind"], metadata, spec]).encode()).hexdigest()[:16]
    whole["metadata"].setdefault("annotations", {})[PLAN] = plan
    return whole


# A served endpoint as a RayService. What changes often (adapters, arms, weights) is in its `user_config` or in the
# registry: a change of `serveConfigV2` alone is taken up by the replicas, a change of the rest makes a second cluster.


LONGEST_REQUEST_S = 600.0
"""Where the spec names none (`request_timeout_s`)."""
MARGIN_S = 60


def service_objects(job: Job, namespace: str, wheel_uri: str | None) -> list[KubeObject]:
    """All that a serve job is on Kubernetes. Raises ConfigError for an endpoint that would be open to anybody."""
    made = build_rayservice(job, namespace, serve_config(job.spec), wheel_uri)
    machines = sum(group.max_count or group.count for group in job.cluster.workers)
    return [made, build_disruption_budget(job, namespace)] if machines > 1 else [made]  # one alone is not guarded by it


def build_rayservice(job: Job, namespace: str, config: Mapping[str, Any], wheel_uri: str | None = None) -> KubeObject:
    """The RayService of a serve job, named by the job's name: the next version of its spec is the same service."""
    cluster = job.cluster
    timeout_s = {"graceful_shutdown_timeout_s": 0, **job.spec}
    facts = PodFacts(
        cluster,
        pod_labels(cluster, job.name, job.name, job.kind),
        job.root,
        wheel_uri,
        serves=True,
        grace_s=max(GRACE_S, termination_grace_s(timeout_s)),
    )
    longest = float(job.spec.get("request_timeout_s", LONGEST_REQUEST_S))
    spec = {
        "serveConfigV2": json.dumps(config, sort_keys=True, ensure_ascii=False, indent=1),
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterDeletionDelaySeconds": math.ceil(longest) + MARGIN_S,
        "excludeHeadPodFromServeSvc": True,
        "serveService": {"spec": {"type": "ClusterIP"}},
        "rayClusterConfig": cluster_part(facts, autoscales=grows(cluster)),
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


def build_disruption_budget(job: Job, namespace: str) -> KubeObject:
    """Lets nodes be emptied one pod of the service at a time."""
    selector = {NAME: label_value(job.name)}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": job.name,
            "namespace": namespace,
            "labels": object_labels(job.cluster, job.name, job.job_id, job.kind),
        },
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector}},
    }


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
    moved = {"host": SERVE_HOST, "port": SERVE_PORT}
    made_of = {key: value for key, value in spec.items() if key not in (*LIVE, *SCALE)} | moved
    application: KubeObject = {
        "name": spec["name"],
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"spec": made_of},
        "deployments": [engine, ingress],
    }
    if working_dir is not None:
        application["runtime_env"] = {"working_dir": working_dir}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": SERVE_HOST, "port": SERVE_PORT},
        "applications": [application],
    }


def termination_grace_s(spec: Mapping[str, Any]) -> int:
    """What a pod needs between its notice and its end: a replica's own time to finish, and a margin for Serve."""
    return int(spec["graceful_shutdown_timeout_s"]) + 15
