"""A real Ray head with a token, on loopback; it can be killed."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.ports import free_port
from tests.ray_cluster import environment

UP_S = 150.0


@dataclass
class Head:
    """Its jobs run in this environment's Python, with this checkout's code."""

    address: str = ""
    token: str = field(default_factory=lambda: secrets.token_hex(24))
    _folder: Path | None = field(default=None, init=False)
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    def start(self, more: Mapping[str, str] | None = None) -> None:
        """Up, and its agent takes jobs. `more`: environment of its jobs."""
        self._folder = Path(tempfile.mkdtemp(prefix="gwh-", dir="/tmp"))  # sockets need short paths
        dashboard = free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        command = [
            "ray",
            "start",
            "--head",
            "--block",
            "--num-cpus=8",
            f"--temp-dir={self._folder}",
            "--disable-usage-stats",
            "--node-ip-address=127.0.0.1",
            f"--port={free_port()}",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--object-store-memory={100 * 2**20}",
        ]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {**environment(), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, **(more or {})}
        with open(self._folder / "head.log", "wb") as log:
            self._process = subprocess.Popen(command, env=own, stdout=log, stderr=log)
        end = time.monotonic() + UP_S
        while not self._takes_jobs():
            said = (self._folder / "head.log").read_text()[-2000:]
            assert self._process.poll() is None, said
            assert time.monotonic() < end, f"no Ray within {UP_S:.0f} s: {said}"
            time.sleep(0.2)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request to its Jobs API: code and JSON; 0 where nobody answers."""
        try:
            answer = httpx.request(
                method,
                f"{self.address}{path}",
                json=body,
                timeout=30,
                headers={"Authorization": f"Bearer {self.token}"},
            )
        except httpx.TransportError:
            return 0, None
        return answer.status_code, answer.json() if answer.is_success else answer.text

    def kill(self) -> None:
        """SIGKILL to all of it: its own processes, its jobs, and what they started."""
        if self._process is None:
            return
        whole = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
        for process in whole:
            process.kill()
        psutil.wait_procs(whole, timeout=20)
        self._process.wait()
        self._process, self.address = None, ""

    def remove(self) -> None:
        """Kill it and delete its folder."""
        self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _takes_jobs(self) -> bool:
        """Whether a first job has ended: the agent comes up after the dashboard, and workers after the agent."""
        code, found = self.ask("GET", "/api/jobs/first")
        if code == 404:
            self.ask("POST", "/api/jobs/", {"entrypoint": "true", "submission_id": "first"})
        return code == 200 and found["status"] == "SUCCEEDED"
