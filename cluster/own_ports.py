"""The ports of an own cluster's node: fixed, so that a firewall can name them, and free before anything starts."""

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from graftwork.errors import ClusterError, ConfigError

GCS_PORT, DASHBOARD_PORT, FIRST_PORT = 6379, 8265, 6380
WORKER_PORTS = 200
_WORKERS_FROM = 10


@dataclass(frozen=True)
class Ports:
    """A block of ports from `first` on, and two of the head alone."""

    first: int = FIRST_PORT
    gcs: int | None = None
    dashboard: int | None = None

    def __post_init__(self) -> None:
        for name, port in self.named().items():
            if not 0 < port < 65536:
                raise ConfigError(f"port {port} ({name})", "no port has this number", "1 to 65535",
                                  "give another --first-port")  # fmt: skip
        block = range(self.first, self.first + _WORKERS_FROM + WORKER_PORTS)
        if self.gcs in block or self.dashboard in block or self.gcs == self.dashboard is not None:
            raise ConfigError(f"--first-port {self.first}", "two of the ports are one",
                              f"a node takes {len(block)} ports from there on",
                              "keep --port and --dashboard-port out of them")  # fmt: skip

    def named(self) -> dict[str, int]:
        """What listens where, the workers' ports by their ends."""
        head = {"gcs": self.gcs, "dashboard": self.dashboard, "dashboard metrics": self.first + 6}
        block = ("raylet", "objects", "agent", "agent http", "metrics", "runtime envs")
        mine = {name: self.first + offset for offset, name in enumerate(block)}
        of_head = {name: port for name, port in head.items() if port is not None and self.gcs is not None}
        return {**of_head, **mine, "workers, first": self.workers[0], "workers, last": self.workers[-1]}

    @property
    def workers(self) -> range:
        """Each process that runs tasks or an actor listens on one."""
        start = self.first + _WORKERS_FROM
        return range(start, start + WORKER_PORTS)


def require_free(ports: Ports, host: str) -> None:
    """Raise ClusterError that names who holds a port; ConfigError where `host` is no address of this machine."""
    fixed = {port: name for name, port in ports.named().items()}
    for port in [*fixed, *ports.workers]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: no wait for closed connections
            try:
                probe.bind((host, port))
            except OSError as error:
                _refuse(error, host, port, fixed.get(port, "workers"))


def _refuse(error: OSError, host: str, port: int, name: str) -> None:
    if error.errno == errno.EADDRNOTAVAIL:
        raise ConfigError(f"--host {host}", "it is no address of this machine", "a node listens on its own address",
                          f"one of {', '.join(own_addresses())}") from None  # fmt: skip
    if error.errno == errno.EACCES:
        raise ConfigError(f"port {port} ({name})", "only root may listen there", "ports from 1024 on") from None
    option = {"gcs": "--port", "dashboard": "--dashboard-port"}.get(name, "--first-port")
    raise ClusterError(
        f"port {port} ({name}) at {host}", f"it is taken{_holder(port)}", "a node's ports are fixed, and its alone",
        f"end that, or give another {option}",
    ) from None  # fmt: skip


def _holder(port: int) -> str:
    """` by NAME (pid N)` where that can be seen."""
    import psutil

    try:
        pids = {c.pid for c in psutil.net_connections("inet") if c.laddr and c.laddr.port == port and c.pid}
        return "".join(f" by {psutil.Process(pid).name()} (pid {pid})" for pid in sorted(pids)[:1])
    except psutil.Error:
        return ""


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine."""
    import psutil

    found = (a.address for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET)
    return sorted(set(found))


def listening(pids: Mapping[int, str]) -> list[tuple[str, int, str]]:
    """(address, port, process) of each listening socket of these processes, as the kernel has them."""
    import psutil

    found = set()
    for pid, name in pids.items():
        try:
            sockets = psutil.Process(pid).net_connections("inet")
        except psutil.Error:
            continue
        found |= {(s.laddr.ip.removeprefix("::ffff:"), s.laddr.port, name) for s in sockets
                  if s.status == psutil.CONN_LISTEN}  # fmt: skip
    return sorted(found, key=lambda each: each[1])
