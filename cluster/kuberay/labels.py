"""Labels of the objects and pods of a job: the job, and the queue and scheduler that place its pods.

`graftwork.dev/job` is a job id, and only that. Pods of a RayService do not have it: a new version of the served spec is
another job, and a changed label of the pod template would make KubeRay replace the cluster.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.spec import ClusterSpec

JOB_LABEL = "graftwork.dev/job"
ATTEMPT_LABEL = "graftwork.dev/attempt"
NAME_LABEL = "graftwork.dev/name"
PLAN_ANNOTATION = "graftwork.dev/plan"
"""Hash of an object as it was planned."""
NODE_TYPE_LABEL = "ray.io/node-type"
"""Set by KubeRay on each pod: `head` or `worker`."""
KUEUE_QUEUE, KUEUE_PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
VOLCANO_QUEUE, VOLCANO_PRIORITY = "volcano.sh/queue-name", "ray.io/priority-class-name"
KAI_QUEUE = "kai.scheduler/queue"
YUNIKORN_APP, YUNIKORN_QUEUE = "yunikorn.apache.org/app-id", "yunikorn.apache.org/queue"
GANG = "ray.io/gang-scheduling-enabled"
"""KubeRay's own; its presence alone makes YuniKorn's task groups. The other names above are each scheduler's."""
GANG_QUEUES = {"volcano": VOLCANO_QUEUE, "kai": KAI_QUEUE, "yunikorn": YUNIKORN_QUEUE}
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
MAX_LABEL = 63
HASH_CHARS = 8


def object_labels(
    cluster: ClusterSpec, name: str, job_id: str, app: str, attempt_id: str | None = None
) -> dict[str, str]:
    """Labels of a RayJob or RayService. KubeRay copies the queue labels to the pods."""
    labels = {
        **cluster.labels,
        "app.kubernetes.io/name": "graftwork",
        "app.kubernetes.io/instance": label_value(name),
        "app.kubernetes.io/component": app,
        "app.kubernetes.io/managed-by": "graftwork",
        JOB_LABEL: label_value(job_id),
        NAME_LABEL: label_value(name),
    }
    if attempt_id is not None:
        labels[ATTEMPT_LABEL] = label_value(attempt_id)
    queue, gang_queue = cluster.queue, cluster.gang_queue
    if queue is not None:
        labels |= {KUEUE_QUEUE: queue, **({KUEUE_PRIORITY: cluster.priority} if cluster.priority else {})}
    if cluster.gang == "yunikorn":
        labels |= {GANG: "true", YUNIKORN_APP: attempt_id or name}
    if cluster.gang != "none" and gang_queue:
        labels[GANG_QUEUES[cluster.gang]] = gang_queue
    if cluster.gang == "volcano" and cluster.priority and queue is None:
        labels[VOLCANO_PRIORITY] = cluster.priority
    return labels


def pod_labels(cluster: ClusterSpec, name: str, job_id: str | None, app: str) -> dict[str, str]:
    """Labels of head and workers; those of a RayService have no job id.

    The operator sets `app.kubernetes.io/name`, since its services select by it.
    """
    return {
        **cluster.labels,
        "app.kubernetes.io/component": app,
        "app.kubernetes.io/part-of": "graftwork",
        **({JOB_LABEL: label_value(job_id)} if job_id is not None else {}),
        NAME_LABEL: label_value(name),
    }


def pod_selector(kind: str, labels: Mapping[str, Any]) -> str | None:
    """Return the label selector of the pods of a RayJob or RayService with these labels; None for a foreign object."""
    key = NAME_LABEL if kind == "RayService" else JOB_LABEL
    return f"{key}={labels[key]}" if labels.get(key) else None


def label_value(text: str) -> str:
    """Return a text as a label value. One that is too long ends with a part of its SHA-256 instead of its own end."""
    allowed = re.sub(r"[^A-Za-z0-9._-]", "-", text).strip("-_.")
    if len(allowed) <= MAX_LABEL:
        return allowed
    suffix = hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]
    return allowed[: MAX_LABEL - HASH_CHARS - 1].rstrip("-_.") + "-" + suffix
