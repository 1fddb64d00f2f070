"""A private Ray on this machine: own temp dir, own token, on loopback, gone with the command that started it.

Ray Serve adds one exception (Ray 2.60): each replica opens a gRPC server on all addresses. It needs the token too, and
refuses a call without it before it unpickles anything (tests/ray/test_serve.py).
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import site
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import graftwork
from graftwork.compat.ray import free_agent_port, init_in, loopback_only, reload_token, without_helpers
from graftwork.errors import ClusterError

DIR_PREFIX = "gw-ray-"
SOCKET_PATH_LIMIT = 107  # bytes of a unix socket path on Linux (sun_path)
RAY_SOCKET_SUFFIX = 66  # bytes that Ray adds: /session_<date>_<time>_<pid>/sockets/plasma_store
OBJECT_STORE_BYTES = 256 * 2**20  # rows and adapters are small; Ray's default takes 30 % of the memory

HEAD_GONE_S = 15
"""How long processes of a private Ray go on without its head, which never comes back: Ray's default is 60."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning of each CPU worker (Ray 2.60)
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # default 2 s: the controller sees a finished or lost worker sooner
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less to start
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # default 600 s
    "RAY_get_check_signal_interval_milliseconds": "100",  # default 1000: how late Ctrl-C may break off a ray.get
    "TOKENIZERS_PARALLELISM": "false",
}
ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"}
"""Of `QUIET`, what holds for a private Ray alone: nobody reclaims this machine's node, but a cluster drains nodes."""

_private = threading.Event()
"""Set while this process has a Ray that `private_ray` started."""


@contextlib.contextmanager
def private_ray(num_cpus: int | None = None) -> Iterator[str]:
    """Start Ray in this process' name, yield its GCS address, stop it and remove its folder whatever happens.

    `num_cpus` is what Ray may hand out (logical); at least 2, so that two workers fit a machine with one core.
    Raises ClusterError when Ray does not come up.
    """
    import ray

    if ray.is_initialized():
        raise ClusterError("--target local", "this process already has a Ray", "one Ray a process", "leave it first")
    folder, lock = own_folder()
    environment = {
        **{key: os.environ.get(key, value) for key, value in QUIET.items()},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": python_path(),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "graftwork.serving.api.http_protocol:install",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_GONE_S),
    }
    try:
        with environment_of(environment), loopback_only(), free_agent_port(), without_helpers(), token_reloaded():
            try:
                address = _start(ray, folder, num_cpus)
                _private.set()
                yield address
            finally:
                _private.clear()
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def logical_cpus(asked: int | None = None) -> int:
    """CPUs that a private Ray hands out, and that a run without Ray may reserve: `asked`, or this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(asked or cores, 2)


def ray_is_up() -> bool:
    """Return whether this process has a Ray. Imports nothing."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def ray_is_private() -> bool:
    """Return whether the Ray of this process is one that `private_ray` started: all its nodes are this machine."""
    return _private.is_set() and ray_is_up()


def _start(ray: Any, folder: Path, num_cpus: int | None) -> str:
    try:
        context = ray.init(
            address="local",
            num_cpus=logical_cpus(num_cpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            **init_in(folder),
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ClusterError(
            "--target local",
            f"a private Ray did not start ({error})",
            "it needs about 1 GiB of memory and a writable temp dir",
            f"look at free memory and at {tempfile.gettempdir()}",
        ) from error
    return str(context.address_info["gcs_address"])


def own_folder() -> tuple[Path, int]:
    """A fresh short temp dir and the lock that says its owner lives; folders of killed owners are removed first."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) + len(DIR_PREFIX) + 9 + RAY_SOCKET_SUFFIX > SOCKET_PATH_LIMIT:
        base = Path("/tmp")
    for left in base.glob(f"{DIR_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    unseen = Path(tempfile.mkdtemp(prefix=f".{DIR_PREFIX}", dir=base))  # another process would take it for a left one
    lock = _lock(unseen)
    return unseen.rename(unseen.with_name(unseen.name[1:])), lock


def _lock(folder: Path) -> int:
    """An flock on the folder itself: it dies with this process. Raises OSError when another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def python_path() -> str:
    """PYTHONPATH with the folder of `graftwork` first, so that workers import this very code."""
    here = str(Path(graftwork.__file__).parent.parent)
    parts = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join(parts if here in [*parts, *site.getsitepackages()] else [here, *parts])


@contextlib.contextmanager
def environment_of(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process and its children, and put back what was there."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def token_reloaded() -> Iterator[None]:
    """Ray caches mode and token in C++ when first asked; make it read the environment again, before and after."""
    reload_token()
    try:
        yield
    finally:
        reload_token()
