"""Hooks into Ray's core: its start on one machine, its token, its nodes, jobs and key-value table.

Checked with Ray 2.60. Nothing here imports ray at module level: commands that start no Ray import this module too.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
HELPERS = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's Node that start the dashboard's API server, the autoscaler's monitor and the log monitor."""


def init_in(folder: Path) -> dict[str, str]:
    """Return the keyword of `ray.init` for the folder of sockets and logs.

    Upstream: `ray.init(_temp_dir=...)`. The public way, RAY_TMPDIR, adds a folder level to
    the paths of sockets, which have 107 bytes, and every child process inherits it.
    """
    return {"_temp_dir": str(folder)}


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Make every Ray process that starts in the block bind 127.0.0.1.

    `ray.init(_node_ip_address="127.0.0.1")` is resolved back to the machine's outer address and all ports bind 0.0.0.0
    (services.resolve_ip_for_localhost). Ray's switch for macOS and Windows laptops keeps loopback. Ray reads it at
    import, so the constant is set as well as the variable for the children.
    Upstream: `ray._private.ray_constants.ENABLE_RAY_CLUSTER`.
    """
    from ray._private import ray_constants

    before, variable = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(LOOPBACK_VARIABLE)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[LOOPBACK_VARIABLE] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if variable is None:
            del os.environ[LOOPBACK_VARIABLE]
        else:
            os.environ[LOOPBACK_VARIABLE] = variable


@contextlib.contextmanager
def free_agent_port() -> Iterator[None]:
    """Give the dashboard agent of a Ray that starts in the block a free port, as Ray's other processes choose theirs.

    The default, 52365, belongs to the machine's first Ray, and the agent of a second Ray then takes no jobs. `ray.init`
    has no argument for it. Upstream: `ray._private.parameter.RayParams(dashboard_agent_listen_port=...)`, which
    `ray.init` looks up in its module at each call.
    """
    from ray._private import parameter

    before = parameter.RayParams
    parameter.RayParams = functools.partial(before, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = before


@contextlib.contextmanager
def without_helpers() -> Iterator[None]:
    """Start Ray in the block without the API server, the autoscaler's monitor and the log monitor.

    `ray.init` starts a Python process for each, and waits for the first; a private Ray asks for no dashboard, adds no
    nodes and sends no logs to the driver. Ray's switches leave the first two running (docs/log.md has the seconds).
    Upstream: the methods `HELPERS` of `ray._private.node.Node`, called without a return value being used.
    """
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in HELPERS}
    for name in HELPERS:
        setattr(Node, name, lambda *_args, **_kwargs: None)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


def reload_token() -> None:
    """Make Ray in this process read RAY_AUTH_MODE and RAY_AUTH_TOKEN from the environment again.

    Ray's C++ part stores mode and token when it first needs them; a process that starts a second Ray, or asks a cluster
    with another token, would use the old ones. Upstream: `ray._raylet.Config.initialize("")` (mode) and
    `ray._raylet.AuthenticationTokenLoader.instance().reset_cache()` (token).
    """
    raylet: Any = importlib.import_module("ray._raylet")  # has no types
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def gcs_address_here() -> str:
    """Return host:port of the GCS of the Ray that this machine belongs to. Raises ConnectionError where there is none.

    Reads RAY_ADDRESS and Ray's own files; connects to nothing, as `ray.init(address="auto")` does at once, for minutes
    where the GCS is gone. Upstream: `ray._private.services.canonicalize_bootstrap_address_or_die("auto")`.
    """
    from ray._private import services

    return str(services.canonicalize_bootstrap_address_or_die("auto"))


def drain_node(gcs_address: str, node_id: str, message: str, deadline_ms: int) -> tuple[bool, str]:
    """Announce to Ray that a node goes away at `deadline_ms` (since the epoch; 0: no deadline) as by preemption.

    Returns (accepted, reason of a refusal). Ray Train takes the notice for a checkpoint, Serve moves its replicas.
    Upstream:
    `ray._raylet.GcsClient(address).drain_node(node, reason, message, deadline)` and
    `ray.core.generated.autoscaler_pb2.DrainNodeReason`.
    """
    from ray.core.generated import autoscaler_pb2

    raylet: Any = importlib.import_module("ray._raylet")  # has no types
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = raylet.GcsClient(address=gcs_address).drain_node(node_id, reason, message, deadline_ms)
    return bool(accepted), str(refusal)


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that were announced to go away; `ray.nodes()` lists them as alive.

    Upstream: `ray._private.state.state.get_draining_nodes()`, ids in hexadecimal -> deadline.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes())


def node_resources(node_id: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return (all, free) resources of a node; empty ones for a node that is gone.

    `ray.available_resources()`, the public function, sums over all nodes. Upstream:
    `ray._private.state.total_resources_per_node` and `available_resources_per_node`.
    """
    from ray._private.state import available_resources_per_node, total_resources_per_node

    return total_resources_per_node().get(node_id, {}), available_resources_per_node().get(node_id, {})


def has_dashboard() -> bool:
    """Return whether the Ray of this process runs a dashboard.

    Upstream: `ray._private.services.get_webui_url_from_internal_kv`, None without one. `ray.init` returns the URL too,
    but only to the code that called it.
    """
    from ray._private.services import get_webui_url_from_internal_kv

    return bool(get_webui_url_from_internal_kv())


def job_has_ended(job_id: str) -> bool:
    """Return whether the driver of a job (id in hexadecimal) has ended; False where the GCS gives no answer now.

    `ray.util.state.list_jobs`, the public function, needs a dashboard, which a private Ray lacks. Upstream:
    `ray._private.worker.global_worker.gcs_client.get_all_job_info`, job id -> message with `is_dead`.
    """
    from ray._private.worker import global_worker
    from ray.exceptions import RayError, RpcError

    try:
        jobs = global_worker.gcs_client.get_all_job_info(
            skip_submission_job_info_field=True, skip_is_running_tasks_field=True
        )
    except (RpcError, RayError):
        return False
    return any(known.hex() == job_id and job.is_dead for known, job in jobs.items())


def table_put(namespace: str, key: str, value: str) -> None:
    """Write a value to the GCS's key-value table, in place of an older one. It lives as long as the cluster.

    Ray has no public table; a named actor would cost a process. Upstream:
    `ray.experimental.internal_kv._internal_kv_put`.
    """
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key.encode(), value.encode(), overwrite=True, namespace=namespace.encode())


def table_get(namespace: str, key: str) -> str | None:
    """Return a value that `table_put` wrote; None without one. Upstream: `internal_kv._internal_kv_get`."""
    from ray.experimental import internal_kv

    found: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=namespace.encode())
    return None if found is None else found.decode()
