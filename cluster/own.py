"""A cluster of one's own: Ray's processes of a head or of a worker, on a few machines and without Kubernetes.

Closed by default: a token always, loopback unless an address is given, fixed ports, a temp dir of its own. A node's
processes are children of the command that started it, and go with it however that ends.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from graftwork.cluster.local import OBJECT_STORE_BYTES, environment_of, own_folder, token_reloaded
from graftwork.cluster.own_join import not_our_token, require_head, tell_waiting
from graftwork.cluster.own_ports import Ports, own_addresses, require_free
from graftwork.cluster.own_redis import password_unseen
from graftwork.compat.ray import loopback_only
from graftwork.errors import ClusterError, ConfigError

ANY_ADDRESS = ("0.0.0.0", "::")
LOOPBACK = "127.0.0.1"
END_S = 10.0

HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""A node whose link is cut is dead after some 16 s; by Ray's defaults (10 s a check, five checks) after a minute."""
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
HEAD_GONE_S = 15
HEAD_BACK_S = 600
"""How long a node waits for its head: one that keeps no state never comes back, one that does is started again."""


@dataclass(frozen=True)
class NodeSpec:
    """What a node is asked to be."""

    host: str
    ports: Ports
    token_file: Path
    cpus: int | None = None
    """None: those of the machine."""
    gpus: int | None = None
    gcs_storage: str | None = None
    """`rocksdb DIR` or redis://HOST:PORT, of the head: what it knows outlives it."""
    all_addresses: bool = False
    head: str | None = None
    """HOST:PORT of the head to join; None: it is the head."""
    object_store_bytes: int = OBJECT_STORE_BYTES


@dataclass(frozen=True)
class Node:
    """A node that runs. `lost()` says which of its processes has ended, None while all live."""

    address: str
    """HOST:PORT of the head's GCS."""
    on: str
    """For `--on`; empty for a worker."""
    pids: Mapping[int, str]
    _ray: Any

    def lost(self) -> str | None:
        for kind, process in self._ray.dead_processes():
            return f"{kind} (exit {process.poll()})"
        return None


@contextlib.contextmanager
def node(spec: NodeSpec) -> Iterator[Node]:
    """Start a node in this process' name; everything of it has ended and its folder is gone at the block's end.

    Raises ClusterError when it does not come up: a taken port, a head that is out of reach, refuses the token or runs
    another Ray; ConfigError for an address that is not this machine's.
    """
    _require_address(spec)
    require_free(spec.ports, spec.host)
    for key in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        os.environ.pop(key, None)  # a token there would win over the file's
    closed = loopback_only() if spec.host == LOOPBACK else contextlib.nullcontext()
    with environment_of(_environment(spec)), token_reloaded(), closed:
        waits_s = require_head(spec.head) if spec.head else HEAD_BACK_S if spec.gcs_storage else HEAD_GONE_S
        os.environ[RECONNECT] = str(waits_s)
        folder, lock = own_folder()
        try:
            ray_node = _start(spec, folder)
            try:
                _name_ourselves(ray_node.gcs_address, folder)
                if spec.head is None:
                    tell_waiting(ray_node.get_gcs_client(), waits_s)
                yield Node(ray_node.gcs_address, "" if spec.head else f"http://{spec.host}:{spec.ports.dashboard}",
                           _pids(), ray_node)  # fmt: skip
            finally:
                _end(ray_node)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _require_address(spec: NodeSpec) -> None:
    if spec.host in ANY_ADDRESS or (spec.all_addresses and spec.host == LOOPBACK):
        raise ConfigError(
            f"--host {spec.host}", "it is no address of one network", "a node has one address that the others reach",
            f"name it ({', '.join(own_addresses())}); --all-addresses opens the dashboard on all of them as well",
        )  # fmt: skip


def _environment(spec: NodeSpec) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `python` of a job is this one
    return {
        "PATH": path,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(spec.token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "DASHBOARD_METRIC_PORT": str(spec.ports.first + 6),
        RECONNECT: "60",
        **HEALTH,
        **(storage_environment(spec.gcs_storage) if spec.gcs_storage and not spec.head else {}),
    }


def storage_environment(asked: str) -> dict[str, str]:
    """What makes Ray's head keep its state there. Redis' password comes from RAY_REDIS_PASSWORD, never from here."""
    kind, _, where = asked.partition(" ")
    if kind == "rocksdb" and where.strip():
        folder = Path(where.strip()).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder)}
    parts = urlsplit(asked)
    if parts.scheme in ("redis", "rediss") and parts.hostname and not parts.username and not parts.password:
        return {"RAY_REDIS_ADDRESS": asked, "RAY_external_storage_namespace": "graftwork"}
    raise ConfigError(
        f"--gcs-storage {parts.scheme + '://...' if parts.password else asked}", "it is no store for the head's state",
        "'rocksdb DIR' or redis://HOST:PORT, its password in RAY_REDIS_PASSWORD and never in the address",
        "--gcs-storage 'rocksdb /var/lib/graftwork/gcs'",
    )  # fmt: skip


def _start(spec: NodeSpec, folder: Path) -> Any:
    from ray._private.node import Node as RayNode
    from ray._private.parameter import RayParams
    from ray.exceptions import RayError

    ports, password = spec.ports, os.environ.pop("RAY_REDIS_PASSWORD", "")
    head = {} if spec.head else {
        "gcs_server_port": ports.gcs, "dashboard_port": ports.dashboard, "include_dashboard": True,
        "dashboard_host": ANY_ADDRESS[0] if spec.all_addresses else spec.host,
        "redis_password": password,
    }  # fmt: skip
    parameters = RayParams(
        temp_dir=str(folder), node_ip_address=spec.host, gcs_address=spec.head, num_cpus=spec.cpus, num_gpus=spec.gpus,
        node_manager_port=ports.first, object_manager_port=ports.first + 1, metrics_agent_port=ports.first + 2,
        dashboard_agent_listen_port=ports.first + 3, metrics_export_port=ports.first + 4,
        runtime_env_agent_port=ports.first + 5, min_worker_port=ports.workers[0], max_worker_port=ports.workers[-1],
        object_store_memory=spec.object_store_bytes, no_monitor=True, include_log_monitor=False, **head,
    )  # fmt: skip
    try:
        with password_unseen(password):
            return RayNode(parameters, head=spec.head is None, shutdown_at_exit=False, spawn_reaper=True)
    except (RayError, RuntimeError, OSError, ValueError) as error:
        asked = f"join {spec.head}" if spec.head else f"cluster start at {spec.host}:{ports.gcs}"
        if "Authentication" in type(error).__name__:
            raise not_our_token(asked) from None
        raise ClusterError(
            asked, f"its node did not start ({str(error).strip()[-500:]})",
            "a node needs about 1 GiB of memory and a writable temp dir", "look at free memory and at the temp dir",
        ) from error  # fmt: skip


def _name_ourselves(address: str, folder: Path) -> None:
    """Ray's Jobs API hands its jobs the address that `ray start` leaves there; without it, any other Ray's of the
    machine (Ray 2.60, job_supervisor.py)."""
    from ray._private.utils import write_ray_address

    write_ray_address(address, str(folder))


def _pids() -> dict[int, str]:
    """Processes below this one."""
    import psutil

    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid] = process.name()
    return found


def _end(ray_node: Any) -> None:
    """Ray's own way first; then whatever is left below this process: jobs' drivers have sessions of their own."""
    import psutil

    below = psutil.Process().children(recursive=True)
    ray_node.kill_all_processes(check_alive=False, allow_graceful=True)
    _, alive = psutil.wait_procs(below, timeout=END_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=END_S)
