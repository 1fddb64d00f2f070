"""`python -m graftwork.cluster.drain SECONDS`: tell Ray that this machine goes away, and wait while it is used.

A pod's preStop hook: training takes the notice for a checkpoint, Serve moves its replicas. Returns at once where
nothing runs here, and where the head is gone too.
"""

import sys
import time

LOOK_S = 1.0


def drain(seconds: float, node_id: str | None = None) -> bool:
    """Whether a node of the Ray here, this one by default, is free of work; it has `seconds` for that."""
    import ray
    from ray.core.generated import autoscaler_pb2

    ray.init(address="auto", configure_logging=False, log_to_driver=False)
    context = ray.get_runtime_context()
    node, until = node_id or context.get_node_id(), time.time() + seconds
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = ray._raylet.GcsClient(address=context.gcs_address).drain_node(
        node, reason, "the pod ends", int(until * 1000)
    )
    if not accepted:
        print(f"not drained: {why}", file=sys.stderr)
        return False
    while _used(node) and time.time() < until:
        time.sleep(LOOK_S)
    return not _used(node)


def _used(node: str) -> bool:
    """Whether any CPU or GPU of the node is taken."""
    from ray._private.state import available_resources_per_node, total_resources_per_node

    have, free = total_resources_per_node().get(node, {}), available_resources_per_node().get(node, {})
    return any(free.get(name, 0.0) < have.get(name, 0.0) for name in ("CPU", "GPU"))


if __name__ == "__main__":
    sys.exit(not drain(float(sys.argv[1])))
