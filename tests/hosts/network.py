"""Several hosts on one machine: network namespaces on a bridge of their own, so that links can be cut (root, iproute2).

Nothing of it touches the machine's own network: the bridge lies in a namespace too. Hosts share files and pids.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

_count = itertools.count()


@dataclass(frozen=True)
class Host:
    """A namespace with one address."""

    namespace: str
    ip: str

    def command(self, *argv: str) -> list[str]:
        """What runs `argv` on this host."""
        return ["ip", "netns", "exec", self.namespace, *argv]


@dataclass
class Network:
    """Hosts that see each other and nothing else."""

    name: str = field(default_factory=lambda: f"gw-{os.getpid()}-{next(_count)}")
    hosts: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.name, "link", "set", "bridge", "up")

    def add(self) -> Host:
        """Another host."""
        number = len(self.hosts) + 1
        host = Host(f"{self.name}-{number}", f"10.77.0.{number}")
        _ip("netns", "add", host.namespace)
        self.hosts.append(host)
        _ip(
            "-n",
            self.name,
            "link",
            "add",
            f"to{number}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            host.namespace,
        )
        _ip("-n", self.name, "link", "set", f"to{number}", "master", "bridge", "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.ip}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", host.namespace, "link", "set", link, "up")
        return host

    def cut(self, host: Host) -> None:
        """No packet reaches it or comes from it; nobody is told."""
        _ip("-n", self.name, "link", "set", self._port(host), "down")

    def restore(self, host: Host) -> None:
        """Undo `cut`."""
        _ip("-n", self.name, "link", "set", self._port(host), "up")

    def close(self) -> None:
        """Remove the namespaces; their processes must have ended."""
        for name in [*[host.namespace for host in self.hosts], self.name]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _port(self, host: Host) -> str:
        return f"to{self.hosts.index(host) + 1}"


@contextmanager
def network() -> Iterator[Network]:
    """A network for the time of the block; skips, and says so, where none can be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("SEVERAL HOSTS ARE NOT TESTED HERE: namespaces need root and iproute2")
    try:
        made = Network()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"SEVERAL HOSTS ARE NOT TESTED HERE: no namespace could be made ({error.stderr.strip()})")
    try:
        yield made
    finally:
        made.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
