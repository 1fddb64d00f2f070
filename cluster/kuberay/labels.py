"""Labels of the objects: whose they are, which queue they wait in, which scheduler places all of their pods or none."""

from graftwork.cluster.kuberay.names import label_value
from graftwork.cluster.spec import ClusterSpec

JOB, ATTEMPT, NAME, PLAN = (f"graftwork.dev/{word}" for word in ("job", "attempt", "name", "plan"))
"""Job id, attempt id and name are labels; the plan's hash is an annotation."""
KUEUE_QUEUE, KUEUE_PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
VOLCANO_QUEUE, VOLCANO_PRIORITY = "volcano.sh/queue-name", "ray.io/priority-class-name"
KAI_QUEUE = "kai.scheduler/queue"
YUNIKORN_APP, YUNIKORN_QUEUE = "yunikorn.apache.org/app-id", "yunikorn.apache.org/queue"
GANG = "ray.io/gang-scheduling-enabled"
"""KubeRay's own; its presence alone makes YuniKorn's task groups. The other names above are each scheduler's."""


def object_labels(
    cluster: ClusterSpec, name: str, job_id: str, app: str, attempt_id: str | None = None
) -> dict[str, str]:
    """Of a RayJob or RayService; the operator hands the queues' on to the pods."""
    own = {
        **cluster.labels, "app.kubernetes.io/name": "graftwork", "app.kubernetes.io/instance": label_value(name),
        "app.kubernetes.io/component": app, "app.kubernetes.io/managed-by": "graftwork", JOB: label_value(job_id),
        NAME: label_value(name),
    }  # fmt: skip
    if attempt_id is not None:
        own[ATTEMPT] = label_value(attempt_id)
    return {**own, **_kueue(cluster), **_gang(cluster, attempt_id or name)}


def pod_labels(cluster: ClusterSpec, name: str, job_id: str, app: str) -> dict[str, str]:
    """Of head and workers. `app.kubernetes.io/name` is left to the operator, whose services select by it."""
    return {
        **cluster.labels, "app.kubernetes.io/component": app, "app.kubernetes.io/part-of": "graftwork",
        JOB: label_value(job_id), NAME: label_value(name),
    }  # fmt: skip


def _kueue(cluster: ClusterSpec) -> dict[str, str]:
    if cluster.queue is None:
        return {}
    return {KUEUE_QUEUE: cluster.queue, **({KUEUE_PRIORITY: cluster.priority} if cluster.priority else {})}


def _gang(cluster: ClusterSpec, app_id: str) -> dict[str, str]:
    queue = cluster.gang_queue
    if cluster.gang == "volcano":
        priority = {VOLCANO_PRIORITY: cluster.priority} if cluster.priority and cluster.queue is None else {}
        return {**({VOLCANO_QUEUE: queue} if queue else {}), **priority}
    if cluster.gang == "kai":
        return {KAI_QUEUE: queue} if queue else {}
    if cluster.gang == "yunikorn":
        return {GANG: "true", YUNIKORN_APP: app_id, **({YUNIKORN_QUEUE: queue} if queue else {})}
    return {}
