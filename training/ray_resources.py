"""Number of workers of a run that the cluster has room for, now or within the time that a run waits."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from graftwork.cluster.private_ray import logical_cpus, ray_is_up
from graftwork.compat.ray import draining_nodes
from graftwork.errors import ClusterError
from graftwork.planning.hardware import gpus_here
from graftwork.training.spec import TrainSpec, world_sizes

POLL_INTERVAL_S = 1.0
"""Between two looks at the cluster."""


def resources_per_worker(spec: TrainSpec) -> dict[str, float]:
    """Resources of the cluster that one worker reserves."""
    return {"CPU": spec.cpus_per_worker, **({"GPU": spec.gpus} if spec.gpus else {})}


def workers_that_fit(spec: TrainSpec) -> int:
    """The largest allowed number of workers. Raises ClusterError when the cluster is too small for the smallest."""
    found = _largest_fit(spec)
    if found is None:
        raise _size_error(spec)
    return found


def workers_soon(spec: TrainSpec, deadline: float) -> int:
    """`workers_that_fit`, waited for. Raises ClusterError after `deadline` (of `time.monotonic`)."""
    while True:
        found = _largest_fit(spec)
        if time.monotonic() > deadline:
            raise never_back(spec)
        if found is not None:
            return found
        time.sleep(POLL_INTERVAL_S)


def _largest_fit(spec: TrainSpec) -> int | None:
    room = room_for(spec, _nodes())
    return next((size for size in world_sizes(spec) if size <= room), None)


def room_for(spec: TrainSpec, nodes: Iterable[Mapping[str, float]]) -> int:
    """Workers that the nodes have resources for, each on one node, whether or not they are in use."""
    need = resources_per_worker(spec)
    return int(sum(min(node.get(name, 0.0) // each for name, each in need.items()) for node in nodes))


def _nodes() -> list[dict[str, float]]:
    """Resources of every node that is alive and stays; without a Ray in this process those of this machine."""
    if not ray_is_up():
        return [{"CPU": float(logical_cpus()), "GPU": float(len(gpus_here()))}]
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    going = draining_nodes()
    return [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in going]


def never_back(spec: TrainSpec) -> ClusterError:
    least, room = world_sizes(spec)[-1], room_for(spec, _nodes())
    fewer = "" if spec.recovery.min_workers else ", or --set recovery.min_workers=1 to go on with fewer"
    return ClusterError(
        f"num_workers={spec.num_workers}, recovery.deadline_s={spec.recovery.deadline_s:g}",
        f"no lost machine came back in time: there is room for {room} workers, the run needs {least}"
        if room < least
        else f"{least} workers have room, but did not start in time",
        "a run waits deadline_s seconds for machines; its last checkpoint is kept",
        f"run the same command when they are there{fewer}",
    )


def _size_error(spec: TrainSpec) -> ClusterError:
    nodes, owner = _nodes(), "the cluster" if ray_is_up() else "this machine"
    for name, each in resources_per_worker(spec).items():
        need, there = each * spec.num_workers, sum(node.get(name, 0.0) for node in nodes)
        if need > there:
            key = f"{name.lower()}s_per_worker"
            return ClusterError(
                f"num_workers={spec.num_workers}, {key}={each:g}",
                f"{owner} has {there:g} {name}, the run needs {need:g}",
                "all workers run at the same time",
                f"--set num_workers={max(1, int(there // each))} or a smaller {key}",
            )
    return ClusterError(
        f"num_workers={spec.num_workers}",
        f"no node has room for {resources_per_worker(spec)} next to the others",
        "a worker lies on one node",
        "take smaller workers, or larger nodes",
    )
