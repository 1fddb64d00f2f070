"""`python -m graftwork.cluster.kuberay.prestop SECONDS [NODE_ID]`: drain a Ray node, and wait while it is used.

A pod's preStop hook: training takes the notice for a checkpoint, Serve moves its replicas. Without NODE_ID the node is
the one of this machine. Returns at once where no work runs on the node. Gives up once the GCS, on the head, has not
accepted a connection for GCS_S: at the end of a job all its pods get their notice together, and a drain without a GCS
would keep each worker's GPUs for the whole grace period. Returns after SECONDS in any case.
"""

import os
import socket
import sys
import threading
import time

from graftwork.compat.ray import drain_node, gcs_address_here, node_resources

POLL_INTERVAL_S = 1.0
GCS_S = 3.0
"""How long a drain goes on without the GCS."""
PROBE_S = 0.5


def drain(seconds: float, node_id: str | None = None) -> bool:
    """Return whether the node is free of work; it has `seconds` for that.

    Ends this process with code 1 where the GCS is gone: Ray's own calls then block for minutes and take no deadline.
    """
    until = time.time() + seconds
    import ray

    try:
        address = gcs_address_here()
    except ConnectionError as error:
        print(f"not drained: {error}", file=sys.stderr)
        return False
    Watchdog(address, until + POLL_INTERVAL_S).start()
    ray.init(address=address, configure_logging=False, log_to_driver=False)
    context = ray.get_runtime_context()
    node = node_id or context.get_node_id()
    accepted, why = drain_node(context.gcs_address, node, "the pod ends", int(until * 1000))
    if not accepted:
        print(f"not drained: {why}", file=sys.stderr)
        return False
    while _is_used(node) and time.time() < until:
        time.sleep(POLL_INTERVAL_S)
    return not _is_used(node)


class Watchdog:
    """Ends this process where the GCS accepts no connection for GCS_S, and at `until` (seconds since the epoch)."""

    def __init__(self, address: str, until: float) -> None:
        host, _, port = address.rpartition(":")
        self._peer, self._until, self._answered = (host.strip("[]"), int(port)), until, time.monotonic()

    def start(self) -> None:
        """Two threads: looking up the head's name takes no deadline, and may block the probe."""
        for run in (self._probe, self._end):
            threading.Thread(target=run, name=run.__name__, daemon=True).start()

    def _probe(self) -> None:
        while True:
            try:
                socket.create_connection(self._peer, timeout=GCS_S).close()
                self._answered = time.monotonic()
            except OSError:
                pass
            time.sleep(PROBE_S)

    def _end(self) -> None:
        while (silent_s := time.monotonic() - self._answered) < GCS_S and time.time() < self._until:
            time.sleep(PROBE_S)
        host, port = self._peer
        why = f"the GCS at {host}:{port} has not answered for {silent_s:.1f} s" if silent_s >= GCS_S else "time is up"
        print(f"not drained: {why}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_used(node: str) -> bool:
    """Return whether any CPU or GPU of the node is taken."""
    have, free = node_resources(node)
    return any(free.get(name, 0.0) < have.get(name, 0.0) for name in ("CPU", "GPU"))


if __name__ == "__main__":
    sys.exit(not drain(float(sys.argv[1]), *sys.argv[2:3]))
