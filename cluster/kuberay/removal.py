"""Waiting until a deleted object of KubeRay's is gone, with its clusters and pods, for as long as these may take.

A deletion in the foreground keeps the object until all that belongs to it has gone. Each pod has its
`terminationGracePeriodSeconds`, in which a worker saves a checkpoint; with Redis, KubeRay then runs a Job that deletes
the head's keys.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.api import KubeApi, namespaced
from graftwork.cluster.kuberay.findings import dig, listed
from graftwork.cluster.kuberay.labels import JOB
from graftwork.errors import ClusterError

GRACE_S = 30
"""Kubernetes' own terminationGracePeriodSeconds, where a template has none."""
REDIS_CLEANUP_S = 300
"""activeDeadlineSeconds of the Job `redis-cleanup` (KubeRay 1.7, raycluster_controller.go, buildRedisCleanupJob)."""
MARGIN_S = 30
"""For the operator, which looks at a cluster that ends every 2 to 10 s, and for the garbage collector."""
REPORT_S = 5.0
QUICK_S, POLL_INTERVAL_S, SLOW_POLL_INTERVAL_S = 10.0, 0.1, 1.0
"""Most objects go within QUICK_S; after that they are looked at less often."""
CLUSTER_PARTS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
SHOWN = 3


def removal_s(found: Mapping[str, Any]) -> int:
    """Return the seconds that the deletion of an object may take: grace of its pods, Redis' cleanup and a margin."""
    part = dig(found, "spec", CLUSTER_PARTS.get(str(found.get("kind")), ""))
    return grace_s(part) + (REDIS_CLEANUP_S if uses_redis(part) else 0) + MARGIN_S


def grace_s(part: Any) -> int:
    """Return the longest grace of the pods of a cluster; 0 for an object that has none of its own."""
    groups = [dig(part, "headGroupSpec"), *listed(dig(part, "workerGroupSpecs"))]
    given = [dig(group, "template", "spec", "terminationGracePeriodSeconds") for group in groups if group]
    return max((GRACE_S if seconds is None else int(seconds) for seconds in given), default=0)


def uses_redis(part: Any) -> bool:
    """Return whether KubeRay cleans up a Redis after the cluster."""
    options = dig(part, "gcsFaultToleranceOptions")
    return options is not None and dig(options, "backend") in (None, "redis")


def remove(api: KubeApi, path: str, kind: str) -> bool:
    """Delete an object with its clusters and pods; return False where it is absent.

    Prints what it waits for, every REPORT_S, on stderr. Raises ClusterError where the object is still there after
    `removal_s`; Kubernetes goes on with the deletion.
    """
    found = api.get(path)
    answer = None if found is None else api.ask("DELETE", path, query={"propagationPolicy": "Foreground"})
    if found is None or answer is None or answer.absent:
        return False
    name = str(found["metadata"]["name"])
    api.required(answer, f"delete {kind} {name}")
    _until_gone(api, path, name, {"kind": kind, **found})
    return True


def _until_gone(api: KubeApi, path: str, name: str, found: Mapping[str, Any]) -> None:
    kind, limit_s = found["kind"], removal_s(found)
    began, said = time.monotonic(), 0.0
    while (left := api.get(path)) is not None:
        took = time.monotonic() - began
        if took > limit_s:
            raise ClusterError(
                f"delete {kind} {name} in {api.on}", f"still there after {limit_s} s: {_holders(api, left)}",
                "its pods' grace, the cleanup of Redis and a margin for the operator have passed; the operator removes "
                "its finalizers once the cluster is gone",
                "see that the operator runs: graftwork doctor --target ...; the deletion goes on meanwhile",
            )  # fmt: skip
        if took - said >= REPORT_S:
            said = took
            print(f"delete {kind} {name}: {took:.0f} s of at most {limit_s} s: {_holders(api, left)}", file=sys.stderr,
                  flush=True)  # fmt: skip
        time.sleep(POLL_INTERVAL_S if took < QUICK_S else SLOW_POLL_INTERVAL_S)


def _holders(api: KubeApi, left: Mapping[str, Any]) -> str:
    """Return what keeps an object: its pods that are there, as far as they may be listed, and its finalizers."""
    job = dig(left, "metadata", "labels", JOB)
    answer = api.ask("GET", namespaced("", "v1", api.place.namespace, "pods"), query={"labelSelector": f"{JOB}={job}"})
    pods = [str(dig(pod, "metadata", "name")) for pod in listed(answer.body.get("items"))] if answer.ok and job else []
    more = f" and {len(pods) - SHOWN} more" if len(pods) > SHOWN else ""
    said = [f"pods that end: {', '.join(pods[:SHOWN])}{more}"] if pods else []
    finalizers = dig(left, "metadata", "finalizers") or []
    return "; ".join([*said, f"finalizers: {', '.join(finalizers) or 'none'}"])
