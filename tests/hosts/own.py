"""Nodes of an own cluster as people start them: `graftwork cluster start` and `join`, each in a process of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.hosts.network import Host
from tests.ports import free_port
from tests.processes import ROOT

UP_S = 120.0
GRAFTWORK = [sys.executable, "-c", "import sys; sys.argv[0] = 'graftwork'; from graftwork.cli import main; main()"]


@dataclass
class OwnNode:
    """A head or a worker."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_up(self) -> None:
        """Until it has told how it listens."""
        until(lambda: "Ctrl-C ends it" in self.said() or self.process.poll() is not None, UP_S, self.said)
        assert self.process.poll() is None, self.said()

    def below(self) -> list[psutil.Process]:
        """All processes of the node."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> float:
        """SIGKILL for every process of it, as a machine that goes away; the moment, by the clock."""
        pids = [self.process.pid, *[process.pid for process in self.below()]]
        moment = time.time()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return moment

    def end(self) -> None:
        """As Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


@dataclass
class OwnCluster:
    """Head and workers, with their token and a folder for all that they write."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gwh-", dir="/tmp")))
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    more: Mapping[str, str] = field(default_factory=dict)
    """Environment of its nodes."""
    nodes: list[OwnNode] = field(default_factory=list)
    head_ip: str = "127.0.0.1"

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def on(self) -> str:
        return f"http://{self.head_ip}:{self.dashboard}"

    def environment(self) -> dict[str, str]:
        """Of its nodes; of a client with the token as well."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return {**kept, "PYTHONPATH": str(ROOT), "GRAFTWORK_CACHE": str(self.folder / "cache"), "TMPDIR": "/tmp"}

    def client_environment(self) -> dict[str, str]:
        return {**self.environment(), "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def start(self, host: Host | None = None, *argv: str) -> OwnNode:
        """Its head; `host` None: on loopback."""
        self.head_ip = host.ip if host else "127.0.0.1"
        words = ["start", "--host", self.head_ip, "--port", str(self.port), "--dashboard-port", str(self.dashboard)]
        node = self._node(host, [*words, "--token-file", str(self.token_file), *argv])
        node.wait_up()
        return node

    def join(self, host: Host | None = None, *argv: str) -> OwnNode:
        """Another worker, not yet up."""
        words = ["join", f"{self.head_ip}:{self.port}"]
        return self._node(host, [*words, *([] if "--token-file" in argv else ["--token-file", str(self.token_file)]),
                                 *argv])  # fmt: skip

    def close(self) -> None:
        """End all of it."""
        for node in reversed(self.nodes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.end()
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _node(self, host: Host | None, words: list[str]) -> OwnNode:
        log = self.folder / f"node{len(self.nodes)}.log"
        command = [*GRAFTWORK, "cluster", *words, "--first-port", str(free_block())]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                host.command(*command) if host else command, cwd=ROOT, env={**self.environment(), **self.more},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        self.nodes.append(OwnNode(process, log))
        return self.nodes[-1]


@contextmanager
def own_cluster(more: Mapping[str, str] | None = None) -> Iterator[OwnCluster]:
    """A cluster that is not started yet; all of it has ended at the block's end."""
    cluster = OwnCluster(more=more or {})
    try:
        yield cluster
    finally:
        cluster.close()


def free_block() -> int:
    """The first of 210 ports below those that `free_port` gives; each call and each process gives another block."""
    slots = (20_000 - 11_000) // 220
    _blocks[0] += 1
    return 11_000 + 220 * ((os.getpid() * 7 + _blocks[0]) % slots)


_blocks = [0]


def until(true: Callable[[], object], timeout_s: float, said: Callable[[], str] = str) -> float:
    """Wait for a condition; the seconds that it took. Fails with what `said` gives."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:.0f} s: {said()[-3000:]}"
        time.sleep(0.1)
    return time.monotonic() - began


def graftwork(cluster: OwnCluster, *argv: str, host: Host | None = None, timeout_s: float = 120,
              env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":  # fmt: skip
    """A client's command, with the cluster's token."""
    command = [*GRAFTWORK, *argv]
    return subprocess.run(
        host.command(*command) if host else command, cwd=cluster.folder, env=env or cluster.client_environment(),
        capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
