"""An endpoint as a job on a Ray that exists: it serves from the head, and goes with its job, however that ends."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.k8s.ray_head import Head
from tests.ports import free_port
from tests.ray_cluster import environment
from tests.service import Made, publish
from tests.waiting import until

COMMAND = "from graftwork.cli import main; main()"
GONE_WITHIN_S = 10.0


@dataclass
class World:
    """Endpoint job on a Ray of its own, with the adapters that it serves."""

    head: Head
    made: Made
    tmp: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def graftwork(self, *argv: str) -> str:
        """What a command prints; it may not fail."""
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *argv],
            cwd=self.tmp,
            text=True,
            capture_output=True,
            timeout=120,
            env={**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.head.token},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, name: str) -> str:
        """Start an endpoint as a job and wait until it answers; the job's id."""
        spec = {
            "kind": "serve",
            "name": name,
            "base": str(self.made.base),
            "root": self.made.store.uri,
            "quant": {"kind": "none"},
            "num_cpus": 0.5,
            "port": self.port,
            "engine": {"max_seq_len": 256, "num_threads": 1},
            "arms": [{"name": "plain"}, {"name": "tuned", "adapter": "card@latest"}],
        }
        (self.tmp / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        told = json.loads(self.graftwork("serve", f"{name}.yaml", "--target", self.head.address, "--detach", "--json"))
        until(
            self.answers,
            lambda: self.graftwork("jobs", "logs", told["job_id"], "--root", self.made.store.uri),
            within_s=120,
        )
        return str(told["job_id"])

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def serve(self) -> dict[str, Any]:
        """Applications of Serve, by name."""
        found: dict[str, Any] = self.head.ask("GET", "/api/serve/applications/")[1]["applications"]
        return found

    def replicas(self) -> list[int]:
        """Pids of the endpoint's processes."""
        return [
            replica["pid"]
            for application in self.serve().values()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        ]

    def gone(self, replicas: list[int]) -> bool:
        """No application, none of these processes, nobody at the port."""
        return not self.serve() and not any(map(psutil.pid_exists, replicas)) and not self.answers()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tmp = tmp_path_factory.mktemp("endpoint")
    made = publish(tmp)
    head = Head()
    try:
        head.start({"GRAFTWORK_CACHE": str(tmp / "cache")})
        yield World(head, made, tmp, free_port())
    finally:
        head.remove()


def experiment(world: World) -> dict[str, Any]:
    arms = [{"name": "plain", "weight": 0.5}, {"name": "tuned", "weight": 0.5}]
    return {
        "kind": "experiment",
        "name": "ab",
        "endpoint": world.url,
        "control": "plain",
        "primary": "latency_ms",
        "arms": arms,
    }


@pytest.mark.soak
def test_an_endpoint_serves_as_a_job_and_is_cancelled_without_a_rest(world: World) -> None:
    job = world.submit("served")
    body = {"model": "arm/tuned", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert httpx.post(f"{world.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    (world.tmp / "ab.yaml").write_text(yaml.safe_dump(experiment(world)))
    world.graftwork("experiment", "start", "ab.yaml")
    body |= {"model": "experiment/ab", "user": "somebody"}
    assert httpx.post(f"{world.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    replicas = world.replicas()
    assert len(replicas) == 2, "ingress and engine"
    world.graftwork("jobs", "cancel", job, "--root", world.made.store.uri)
    until(lambda: world.gone(replicas), world.serve, within_s=GONE_WITHIN_S)


@pytest.mark.soak
def test_an_endpoint_goes_when_its_driver_is_killed_and_the_next_attempt_serves(world: World) -> None:
    job = world.submit("killed")
    replicas = world.replicas()
    drivers = [p for p in psutil.process_iter(["cmdline"]) if job in " ".join(p.info["cmdline"] or []).split()]
    assert drivers
    for process in {process for driver in drivers for process in [driver, *driver.children(recursive=True)]}:
        process.kill()
    until(lambda: world.gone(replicas), world.serve, within_s=GONE_WITHIN_S)
    world.graftwork("jobs", "cancel", job, "--root", world.made.store.uri)
    world.graftwork("jobs", "resubmit", job, "--root", world.made.store.uri)
    until(world.answers, lambda: world.graftwork("jobs", "logs", job, "--root", world.made.store.uri), within_s=120)
    replicas = world.replicas()
    world.graftwork("jobs", "cancel", job, "--root", world.made.store.uri)
    until(lambda: world.gone(replicas), world.serve, within_s=GONE_WITHIN_S)
