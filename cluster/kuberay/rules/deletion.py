"""Rules for the deletion of an ended RayJob: by shutdown and a time, or by deletion rules; not by both."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from graftwork.cluster.kuberay.object_view import Found, dig, listed, mapping, number, refuse

ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
"""What goes later has a time no shorter."""
Object = Mapping[str, Any]


def ttl_needs_shutdown(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    ttl = number(spec.get("ttlSecondsAfterFinished")) or 0
    if ttl > 0 and spec.get("shutdownAfterJobFinishes") is not True:
        yield refuse(
            "TTL-NEEDS-SHUTDOWN",
            "spec.ttlSecondsAfterFinished",
            f"{ttl} without shutdownAfterJobFinishes",
            "nothing is deleted at that time",
            "shutdownAfterJobFinishes: true, or remove ttlSecondsAfterFinished",
        )


def one_way(made: Object) -> Found:
    strategy, where = dig(made, "spec", "deletionStrategy"), "spec.deletionStrategy"
    if not isinstance(strategy, Mapping):
        return
    rules, legacy = listed(strategy.get("deletionRules")), {"onSuccess", "onFailure"} & set(strategy)
    shutdown = dig(made, "spec", "shutdownAfterJobFinishes") is True
    if rules and shutdown:
        yield refuse(
            "DELETION-SHUTDOWN",
            where,
            "deletionRules with shutdownAfterJobFinishes",
            "deletionRules and shutdownAfterJobFinishes exclude each other",
            "set shutdownAfterJobFinishes: false, or remove deletionRules",
        )
    if rules and legacy:
        yield refuse(
            "DELETION-LEGACY",
            where,
            f"deletionRules with {', '.join(sorted(legacy))}",
            "deletionRules replace onSuccess and onFailure",
            f"remove {' and '.join(sorted(legacy))}",
        )
    elif not rules and len(legacy) < 2:
        yield refuse(
            "DELETION-EMPTY",
            where,
            "neither deletionRules nor both onSuccess and onFailure",
            "a deletionStrategy has deletionRules, or both onSuccess and onFailure",
            "remove deletionStrategy, or add both onSuccess and onFailure: {policy: DeleteCluster}",
        )


def legacy_policies(made: Object) -> Found:
    strategy = mapping(dig(made, "spec", "deletionStrategy"))
    for side in ("onSuccess", "onFailure"):
        if side not in strategy:
            continue
        where, policy = f"spec.deletionStrategy.{side}.policy", dig(strategy, side, "policy")
        if policy is None:
            yield refuse(
                "DELETION-POLICY",
                where,
                "none",
                "a policy names what is deleted",
                "policy: DeleteCluster (or DeleteWorkers, DeleteSelf, DeleteNone)",
            )
        if policy == "DeleteNone" and dig(made, "spec", "shutdownAfterJobFinishes") is True:
            yield refuse(
                "DELETION-NONE",
                where,
                "DeleteNone with shutdownAfterJobFinishes",
                "DeleteNone keeps the cluster, and shutdownAfterJobFinishes deletes it",
                "set shutdownAfterJobFinishes: false, or policy: DeleteCluster",
            )
        yield from _possible(made, where, policy)


def deletion_rules(made: Object) -> Found:
    seen: dict[tuple[str, str, str], float] = {}
    for index, rule in enumerate(listed(dig(made, "spec", "deletionStrategy", "deletionRules"))):
        where = f"spec.deletionStrategy.deletionRules[{index}]"
        condition, policy = mapping(rule.get("condition")), str(rule.get("policy"))
        told = [key for key in ("jobStatus", "jobDeploymentStatus") if condition.get(key) is not None]
        if len(told) != 1:
            yield refuse(
                "DELETION-CONDITION",
                f"{where}.condition",
                f"{len(told)} of jobStatus, jobDeploymentStatus",
                "a condition has exactly one of jobStatus and jobDeploymentStatus",
                "condition: {jobStatus: SUCCEEDED, ttlSeconds: 300}",
            )
            continue
        if (ttl := number(condition.get("ttlSeconds")) or 0) < 0:
            yield refuse(
                "NEGATIVE", f"{where}.condition.ttlSeconds", f"{ttl}", "a time is 0 s or more", "ttlSeconds: 0"
            )
        yield from _possible(made, f"{where}.policy", policy)
        key = (told[0], str(condition[told[0]]), policy)
        if key in seen:
            yield refuse(
                "DELETION-TWICE",
                where,
                f"{policy} at {key[1]} is said before",
                "each policy appears once per status",
                f"remove deletionRules[{index}]",
            )
        seen.setdefault(key, ttl)
    yield from _in_order(seen)


def _possible(made: Object, where: str, policy: Any) -> Found:
    if policy in ("DeleteCluster", "DeleteWorkers") and dig(made, "spec", "clusterSelector"):
        yield refuse(
            "DELETION-SELECTOR",
            where,
            f"{policy} with clusterSelector",
            "the cluster belongs to clusterSelector, not to this job",
            "policy: DeleteSelf, or DeleteNone",
        )
    if policy == "DeleteWorkers" and dig(made, "spec", "rayClusterSpec", "enableInTreeAutoscaling") is True:
        yield refuse(
            "DELETION-AUTOSCALER",
            where,
            "DeleteWorkers with the autoscaler",
            "the autoscaler starts deleted workers again",
            "policy: DeleteCluster, or enableInTreeAutoscaling: false",
        )


def _in_order(seen: Mapping[tuple[str, str, str], float]) -> Found:
    for field, status in dict.fromkeys((field, status) for field, status, _ in seen):
        told = [(policy, seen[field, status, policy]) for policy in ORDER if (field, status, policy) in seen]
        for (first, early), (then, late) in pairwise(told):
            if late < early:
                yield refuse(
                    "DELETION-ORDER",
                    "spec.deletionStrategy.deletionRules",
                    f"at {status}: {then} after {late} s, {first} after {early} s",
                    "workers are deleted first, then the cluster, then the job",
                    f"set ttlSeconds of {then} to {early:g} or more",
                )


DELETION_RULES = (ttl_needs_shutdown, one_way, legacy_policies, deletion_rules)
