"""Whether a head can be joined: reached, willing, and of the same Ray and Python, within seconds."""

import importlib
import socket
import sys
import threading
from typing import Any

from graftwork.cluster.address import REACH_S
from graftwork.errors import ClusterError, ConfigError

ANSWER_S = 8.0
WAITS, KV_NAMESPACE = "waits_s", b"graftwork"


def require_head(head: str) -> int:
    """How many seconds a worker waits for this head when it is gone, as `tell_waiting` said.

    Raises ClusterError unless the GCS at HOST:PORT takes this token and is like us. Takes at most some 13 s.
    """
    try:
        socket.create_connection(_host_and_port(head), timeout=REACH_S).close()
    except OSError as error:
        raise ClusterError(f"join {head}", f"nothing answers there ({error})", "a head's GCS listens there",
                           "start the head first; see that no firewall is between") from None  # fmt: skip
    found = _asked(head)
    ours = {"ray_version": _ray_version(), "python_version": ".".join(map(str, sys.version_info[:3]))}
    for key, mine in ours.items():
        if found.get(key) != mine:
            raise ClusterError(
                f"join {head}", f"{key} is {found.get(key)} there and {mine} here",
                "all nodes of a cluster run one Ray and one Python",
                f"install {key.removesuffix('_version')} {found.get(key)} here",
            )  # fmt: skip
    return int(found[WAITS])


def tell_waiting(gcs_client: Any, waits_s: int) -> None:
    """By the head, for those who join."""
    gcs_client.internal_kv_put(WAITS.encode(), str(waits_s).encode(), True, KV_NAMESPACE)


def _asked(head: str) -> dict[str, Any]:
    """What the head says of itself. Ray's client waits without an end for something that is no GCS."""
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray.exceptions import AuthenticationError, RayError

    raylet: Any = importlib.import_module("ray._raylet")  # has no types
    found: dict[str, Any] = {}
    failed: list[Exception] = []

    def ask() -> None:
        try:
            client = raylet.GcsClient(address=head)
            waits_s = client.internal_kv_get(WAITS.encode(), KV_NAMESPACE)
            found.update({**(get_cluster_metadata(client) or {}), WAITS: waits_s or b"60"})
        except (RayError, RuntimeError, OSError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=ask, name="gcs-client", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if failed and isinstance(failed[0], AuthenticationError):
        raise not_our_token(f"join {head}")
    if not found:
        raise ClusterError(
            f"join {head}", f"it gives no answer as a head ({failed[0] if failed else f'{ANSWER_S:.0f} s'})",
            "the port of a head's GCS is needed, usually 6379", "look at what its `cluster start` printed",
        )  # fmt: skip
    return found


def _ray_version() -> str:
    import ray

    return str(ray.__version__)


def not_our_token(asked: str) -> ClusterError:
    """The head is there and does not take us."""
    return ClusterError(asked, "it refused the token", "a cluster takes its own token alone",
                        "copy the head's token file here, with mode 0600, or name it by --token-file")  # fmt: skip


def address_towards(head: str) -> str:
    """This machine's address on the way to the head; nothing is sent. Raises ClusterError where no way leads there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_host_and_port(head))
        except OSError as error:
            raise ClusterError(f"join {head}", f"no way leads there ({error})", "the head is reached by its address",
                               "check the address and this machine's network") from None  # fmt: skip
        return str(probe.getsockname()[0])


def _host_and_port(head: str) -> tuple[str, int]:
    host, _, port = head.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"join {head}", "not the address of a head", "HOST:PORT, as its `cluster start` printed it",
                          "graftwork cluster join 10.0.0.1:6379")  # fmt: skip
    return host, int(port)
