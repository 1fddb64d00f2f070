"""Nodes of a Ray cluster, started by the commands of docs/ray-cluster.md, each in a process of its own."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.hosts.network import Host
from tests.ports import free_port
from tests.process_races import ROOT
from tests.waiting import until

PAGE = ROOT / "docs" / "ray-cluster.md"
HEAD_IP, WORKER_IP = "10.0.0.1", "10.0.0.2"
"""Addresses of the page."""
UP = "This command will now block forever"
"""Printed by `ray start --block` when the node runs."""
UP_S = 120.0
FIRST, LAST = 6380, 6589
"""Ports of the page for every machine."""
GRAFTWORK = [sys.executable, "-c", "import sys; sys.argv[0] = 'graftwork'; from graftwork.cli import main; main()"]
LOOPBACK = "127.0.0.1"
GRPC = {"GCS", "Ray Client server", "raylet", "object manager", "agent (gRPC)", "worker processes"}
"""Processes of the page's table of ports that speak gRPC."""
_blocks = itertools.count()


def commands(section: str) -> str:
    """Return the bash block of a section of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert found, f"{PAGE} has no commands under {section!r}"
    return found[1]


def port_table() -> dict[int, tuple[str, str]]:
    """Return {port: (process, machines)} of the page's table, without the range of the worker processes."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## Ports\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {int(row[0]): (row[1], row[2]) for row in rows if row[0].isdecimal()}


@dataclass
class RayNode:
    """A head or a worker."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_up(self) -> None:
        """Wait until `ray start` reports that the node runs."""
        until(lambda: UP in self.said() or self.process.poll() is not None, self.said, within_s=UP_S)
        assert self.process.poll() is None, self.said()

    def below(self) -> list[psutil.Process]:
        """All processes of the node."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> float:
        """SIGKILL every process of the node, as when a machine goes away; returns the time of day."""
        pids = [self.process.pid, *[process.pid for process in self.below()]]
        moment = time.time()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return moment

    def end(self) -> None:
        """End the node as Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


@dataclass
class RayCluster:
    """Head and workers, with their token and a folder for everything that they write.

    On hosts of their own the page's commands run with other addresses alone. On loopback, where other Rays may run,
    the ports are replaced by free ones as well.
    """

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gwh-", dir="/tmp")))
    keeps: bool = False
    """With the settings of the page's section on fault tolerance."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Environment of its nodes."""
    nodes: list[RayNode] = field(default_factory=list)
    head: Host | None = None
    _ports: dict[int, int] = field(default_factory=dict)
    """Of the head on loopback, by those of the page."""

    def __post_init__(self) -> None:
        self.run(commands("Authentication"))

    @property
    def token_file(self) -> Path:
        return self.folder / ".ray" / "auth_token"

    @property
    def head_ip(self) -> str:
        return self.head.ip if self.head else LOOPBACK

    @property
    def port(self) -> int:
        """Of the GCS."""
        return self.real(6379)

    def real(self, port: int) -> int:
        """Return the head's port for one of the page."""
        return self._ports.get(port, port)

    @property
    def on(self) -> str:
        return f"http://{self.head_ip}:{self.real(8265)}"

    def environment(self) -> dict[str, str]:
        """Environment of a machine of the cluster: `~` is the cluster's folder, `ray` is that of this Python."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return {
            **kept,
            "PYTHONPATH": str(ROOT),
            "GRAFTWORK_CACHE": str(self.folder / "cache"),
            "TMPDIR": "/tmp",
            "HOME": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def client_environment(self) -> dict[str, str]:
        return {**self.environment(), "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def run(self, block: str) -> None:
        """Run commands of the page to their end."""
        subprocess.run(["bash", "-euc", block], env=self.environment(), check=True, stdin=subprocess.DEVNULL)

    def start(self, host: Host | None = None, *argv: str) -> RayNode:
        """Start the head; `host` None: on loopback. Returns when its dashboard listens."""
        self.head = host
        if host is None and not self._ports:
            self._ports = {**_block(), **{port: free_port() for port in (6379, 8265, 10001)}}
        node = self._node(host, commands("The head"), {HEAD_IP: self.head_ip}, self._ports, argv)
        node.wait_up()
        if host is None:
            until(lambda: _listens(self.real(8265)), node.said, within_s=UP_S)
        return node

    def join(self, host: Host | None = None, *argv: str, home: Path | None = None) -> RayNode:
        """Start another worker, not yet up; `home`: with the token of another home folder."""
        addresses = {HEAD_IP: self.head_ip, WORKER_IP: host.ip if host else LOOPBACK}
        ports = {} if host else {**_block(), 6379: self.port}
        return self._node(host, commands("A worker"), addresses, ports, argv, home)

    def close(self) -> None:
        """End all of it."""
        for node in reversed(self.nodes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.end()
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _node(
        self,
        host: Host | None,
        start: str,
        addresses: Mapping[str, str],
        ports: Mapping[int, int],
        argv: tuple[str, ...],
        home: Path | None = None,
    ) -> RayNode:
        keeping = commands("Fault tolerance") if self.keeps else ""
        block = f"{commands('Every machine')}{keeping}exec {start.rstrip()} {' '.join(argv)}"
        for address, real in addresses.items():
            assert address in block, f"the commands of {PAGE} name {address}"
            block = block.replace(address, real)
        if ports:
            block = re.sub(r"\b\d{4,5}\b", lambda found: str(ports.get(int(found[0]), found[0])), block)
        number = len(self.nodes)
        log, temp = self.folder / f"node{number}.log", self.folder / f"n{number}"
        temp.mkdir()
        environment = {**self.environment(), **self.more, "RAY_TMPDIR": str(temp)}
        if home is not None:
            environment["HOME"] = str(home)
        command = ["bash", "-euc", block]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                host.command(*command) if host else command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self.nodes.append(RayNode(process, log))
        return self.nodes[-1]


@contextmanager
def ray_cluster(more: Mapping[str, str] | None = None, *, keeps: bool = False) -> Iterator[RayCluster]:
    """Yield a cluster that is not started yet; all of it has ended at the block's end."""
    cluster = RayCluster(keeps=keeps, more=more or {})
    try:
        yield cluster
    finally:
        cluster.close()


def _block() -> dict[int, int]:
    """Return ports for those that the page gives to every machine, below those of `free_port`."""
    slots = (20_000 - 11_000) // 220
    first = 11_000 + 220 * ((os.getpid() * 7 + next(_blocks)) % slots)
    return {port: first + port - FIRST for port in range(FIRST, LAST + 1)}


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def graftwork(
    cluster: RayCluster,
    *argv: str,
    host: Host | None = None,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a client's command, with the cluster's token."""
    command = [*GRAFTWORK, *argv]
    return subprocess.run(
        host.command(*command) if host else command,
        cwd=cluster.folder,
        env=env or cluster.client_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
