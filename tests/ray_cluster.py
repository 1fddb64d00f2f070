"""A Ray of several raylets on this machine, each with its own CPUs: nodes that tests kill, add and drain.

Run as a program it is the cluster: it reads one command a line (`add CPUS`, `drain NODE_ID`) and answers in JSON.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port
from tests.process_races import ROOT

DETECTION = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""How soon Ray sees a dead node: docs/guide-training.md names these for clusters."""


@dataclass(frozen=True)
class Raylet:
    """One node."""

    node_id: str
    pid: int

    def kill(self) -> None:
        """SIGKILL; its workers end when they notice. A drained one may have ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Raylets:
    """The cluster, in a process of its own; its head has no CPUs, so that workers lie on the other nodes alone."""

    def __init__(self, more: Mapping[str, str] | None = None) -> None:
        """`more`: environment of all workers, such as the keys of a store; Ray's workers have that of their raylet."""
        self._folder = Path(tempfile.mkdtemp(prefix="gwn-", dir="/tmp"))  # sockets need short paths
        self._log = open(self._folder / "log", "w")  # noqa: SIM115  # for as long as the process runs
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster", str(self._folder)],
            cwd=ROOT,
            env={**environment(), **(more or {})},
            text=True,
            stdin=pipe,
            stdout=pipe,
            stderr=self._log,
        )
        self.address = str(self._answer()["address"])

    def add(self, cpus: int = 1) -> Raylet:
        return Raylet(**self._ask(f"add {cpus}"))

    def gcs(self) -> psutil.Process:
        """The head's GCS server, to be killed or stopped."""
        [found] = [
            one for one in psutil.Process(self._process.pid).children(recursive=True) if one.name() == "gcs_server"
        ]
        return found

    def drain(self, raylet: Raylet) -> None:
        """Tell Ray that the node will be taken away in a while, as a cloud's notice does."""
        assert self._ask(f"drain {raylet.node_id}")["accepted"]

    def close(self) -> None:
        """End every process of it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._log.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(f"the cluster ended: {(self._folder / 'log').read_text()[-3000:]}")


def environment() -> dict[str, str]:
    """This process' environment without what the private Ray of other tests put there."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    loopback = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"
    }  # else 127.0.0.1 becomes the outer address: cluster/private_ray.py
    return {**kept, **loopback, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


def _serve(folder: str) -> None:
    from graftwork.compat.ray import free_agent_port, without_helpers

    with contextlib.ExitStack() as stack:
        for setting in (free_agent_port(), without_helpers()):
            stack.enter_context(setting)
        head = _node(folder, gcs_server_port=free_port(), num_cpus=0, _system_config=DETECTION)
        stack.callback(head.kill_all_processes, check_alive=False, allow_graceful=False)
        print(json.dumps({"address": head.gcs_address}), flush=True)
        for line in sys.stdin:
            verb, word = line.split()
            if verb == "add":
                node = _node(folder, gcs_address=head.gcs_address, num_cpus=int(word))
                stack.callback(node.kill_all_processes, check_alive=False, allow_graceful=False)
                answer = {"node_id": node.node_id, "pid": node.all_processes["raylet"][0].process.pid}
            else:
                answer = _drain(head.gcs_address, word)
            print(json.dumps(answer), flush=True)


def _node(folder: str, **settings: Any) -> Any:
    """A node. Not by ray.cluster_utils.Cluster, which writes its address to /tmp/ray, where other Rays look for it."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        temp_dir=folder,
        include_dashboard=False,
        include_log_monitor=False,
        object_store_memory=100 * 2**20,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        **settings,
    )
    return Node(parameters, head="gcs_server_port" in settings, shutdown_at_exit=True, spawn_reaper=True)


def _drain(address: str, node_id: str) -> dict[str, Any]:
    import ray
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = ray._raylet.GcsClient(address=address).drain_node(node_id, reason, "the test's notice", 0)
    return {"accepted": accepted, "why": why}


if __name__ == "__main__":
    _serve(sys.argv[1])
