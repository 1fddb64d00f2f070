"""A Ray head with its dashboard, on loopback and with a token: what an address or a RayService finds."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.ports import free_port
from tests.processes import ROOT

UP_WITHIN_S = 240.0
TOKEN = "0123456789abcdef" * 3


@dataclass(frozen=True)
class Head:
    """A running one."""

    dashboard: str
    environment: dict[str, str]
    """Of a process that may talk to it."""
    pid: int

    def processes(self) -> dict[int, str]:
        """Command line by pid of all that runs below it now."""
        found: dict[int, str] = {}
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found[process.pid] = " ".join(process.cmdline())
        return found

    def serve(self) -> dict[str, Any]:
        """What Serve says of itself: applications, replicas, proxies."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=self._headers, timeout=60)
        found: dict[str, Any] = answer.json()
        return found

    @property
    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {TOKEN}"}


@contextlib.contextmanager
def running_head(cpus: int, more: Mapping[str, str] | None = None) -> Iterator[Head]:
    """`more`: environment of the head and all that it starts, such as an endpoint's keys."""
    ports = [free_port() for _ in range(4)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {
        **plain, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0", **(more or {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gwr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = ["ray", "start", "--head", "--block", f"--num-cpus={cpus}", f"--temp-dir={folder}",
                   f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
                   f"--ray-client-server-port={ports[3]}", "--min-worker-port=0", "--max-worker-port=0",
                   "--include-dashboard=true", "--object-store-memory=100000000"]  # fmt: skip
        with open(Path(folder) / "head.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait_for(ports[1], process, Path(folder) / "head.log")
            yield Head(f"http://127.0.0.1:{ports[1]}", environment, process.pid)
        finally:
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(timeout=120)
            for left in psutil.wait_procs(below, timeout=20)[1]:
                left.kill()


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + UP_WITHIN_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.1)
    raise AssertionError(f"the head does not listen on {port}: {log.read_text()[-2000:]}")
