"""Queues and schedulers of gangs: what they need of a RayJob, told before it waits for ever."""

from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.findings import Found, dig, listed, mapping, refuse, warn
from graftwork.cluster.kuberay.labels import KAI_QUEUE, KUEUE_QUEUE, VOLCANO_QUEUE

KUEUE_GROUPS = 7
"""A Workload of Kueue's has eight sets of pods, and one is the head."""
Object = Mapping[str, Any]


def kueue(made: Object) -> Found:
    if KUEUE_QUEUE not in _labels(made):
        return
    spec, where = mapping(made.get("spec")), f"metadata.labels.{KUEUE_QUEUE}"
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield refuse("KUEUE-SHUTDOWN", where, "shutdownAfterJobFinishes is not true", "its quota would never come back",
                     "shutdownAfterJobFinishes: true")  # fmt: skip
    if spec.get("clusterSelector"):
        yield refuse("KUEUE-SELECTOR", where, "with clusterSelector", "Kueue admits the cluster, and this job has none")
    groups = len(listed(dig(spec, "rayClusterSpec", "workerGroupSpecs")))
    if groups > KUEUE_GROUPS:
        yield refuse("KUEUE-GROUPS", where, f"{groups} worker groups", f"at most {KUEUE_GROUPS} beside the head",
                     "merge equal groups")  # fmt: skip
    if dig(spec, "rayClusterSpec", "enableInTreeAutoscaling") is True:
        yield refuse("KUEUE-AUTOSCALER", where, "with the autoscaler", "Kueue admits a fixed number of machines")


def two_queues(made: Object) -> Found:
    labels = _labels(made)
    others = [label for label in (VOLCANO_QUEUE, KAI_QUEUE) if label in labels]
    if KUEUE_QUEUE in labels and others:
        yield warn("TWO-QUEUES", f"metadata.labels.{others[0]}", f"beside Kueue's {labels[KUEUE_QUEUE]!r}",
                   "a job that one queue lets go may wait in the other and hold the first one's quota",
                   "drop `queue` or `gang_queue`")  # fmt: skip


def kai_has_no_submitter(made: Object) -> Found:
    mode = dig(made, "spec", "submissionMode")
    if KAI_QUEUE in _labels(made) and mode in (None, "K8sJobMode"):
        yield refuse(
            "KAI-SUBMITTER",
            "spec.submissionMode",
            "K8sJobMode",
            "KAI cannot place a submitter that comes after its cluster",
            "submissionMode: HTTPMode",
        )


def _labels(made: Object) -> Mapping[str, Any]:
    return mapping(dig(made, "metadata", "labels"))


QUEUE_RULES = (kueue, two_queues, kai_has_no_submitter)
