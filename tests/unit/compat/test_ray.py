"""Hooks into Ray's core, on a private Ray of this process."""

import inspect
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from graftwork.cluster.private_ray import private_ray
from graftwork.compat import ray as hooks
from tests.process_races import ROOT
from tests.waiting import until


class Busy:
    """Takes a CPU."""

    def ready(self) -> bool:
        return True


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if ray.is_initialized():
        pytest.skip("drains its node: run it in a process without the Ray of tests/ray")
    with private_ray(num_cpus=3) as address:
        yield address


def own_processes() -> list[psutil.Process]:
    """Ray's processes that this process started."""
    return [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]


def command(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def test_sockets_and_logs_are_in_the_folder(address: str) -> None:
    raylet = next(one for one in own_processes() if one.name() == "raylet")
    session = next(word for word in raylet.cmdline() if word.startswith("--session_dir="))
    assert "/gw-ray-" in session


def test_every_process_listens_on_loopback_alone(address: str) -> None:
    """`ray::` workers listen too; the raylet and the GCS are there for sure."""
    listening = {
        (process.name(), connection.laddr.ip)
        for process in own_processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert address.startswith("127.0.0.1:")


def test_the_agent_chooses_its_port(address: str) -> None:
    raylet = next(one for one in own_processes() if one.name() == "raylet")
    [agent] = [word for word in raylet.cmdline() if word.startswith("--dashboard_agent_command=")]
    assert "--listen-port=0" in agent.split()


def test_the_three_helpers_do_not_run(address: str) -> None:
    commands = " ".join(map(command, own_processes()))
    for script in ("dashboard/dashboard.py", "monitor.py", "log_monitor.py"):
        assert f"/{script}" not in commands


def test_the_helpers_are_methods_that_start_processes_and_return_nothing_that_is_used() -> None:
    """The methods start the processes whose absence the test above asserts; callers drop what they return."""
    from ray._private import node

    source = inspect.getsource(node)  # the class itself has them replaced while the private Ray runs
    for name in hooks.HELPERS:
        assert f"    def {name}(self" in source.replace("(\n        self", "(self")
        assert f"services.{name}(" in source
        assert f"            self.{name}(" in source or f"        self.{name}(\n" in source
        assert f"= self.{name}(" not in source


def test_the_switches_are_put_back(address: str) -> None:
    from ray._private import parameter, ray_constants
    from ray._private.node import Node

    before = (ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams, *(getattr(Node, one) for one in hooks.HELPERS))
    with hooks.loopback_only(), hooks.free_agent_port(), hooks.without_helpers():
        assert not ray_constants.ENABLE_RAY_CLUSTER
        assert os.environ[hooks.LOOPBACK_VARIABLE] == "0"
        assert parameter.RayParams(num_cpus=1).dashboard_agent_listen_port == 0
        assert Node.start_monitor is not before[3]
    after = (ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams, *(getattr(Node, one) for one in hooks.HELPERS))
    assert after == before


def test_ray_reads_its_token_again() -> None:
    """In a process of its own: the token of this one belongs to the private Ray."""
    code = """
import os, ray._raylet as raylet
from graftwork.compat.ray import reload_token
def seen(mode, token):
    os.environ.update(RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token)
    reload_token()
    loader = raylet.AuthenticationTokenLoader.instance()
    return int(raylet.get_authentication_mode()), loader.get_raw_token() if mode == "token" else None
print([seen("token", "a" * 32), seen("token", "b" * 32), seen("disabled", "c" * 32)])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = eval(done.stdout)  # noqa: S307  # printed above
    assert found == [(1, "a" * 32), (1, "b" * 32), (0, None)], "1: Ray's AuthenticationMode.TOKEN"


def test_the_address_is_that_of_the_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert hooks.gcs_address_here() == address


def test_a_node_has_resources_that_a_task_takes(address: str) -> None:
    node = ray.get_runtime_context().get_node_id()

    busy = ray.remote(Busy).options(num_cpus=2).remote()
    assert ray.get(busy.ready.remote())
    until(lambda: hooks.node_resources(node)[1].get("CPU") == 1, "two of three CPUs are taken", within_s=20)
    assert hooks.node_resources(node)[0]["CPU"] == 3
    assert hooks.node_resources("f" * 56) == ({}, {})
    ray.kill(busy)


def test_a_private_ray_has_no_dashboard(address: str) -> None:
    from ray.experimental import internal_kv

    assert not hooks.has_dashboard()
    internal_kv._internal_kv_put("webui:url", "127.0.0.1:1", namespace="dashboard")
    try:
        assert hooks.has_dashboard(), "Ray writes its dashboard's address under this key"
    finally:
        internal_kv._internal_kv_del("webui:url", namespace="dashboard")


def test_the_table_holds_values_by_namespace(address: str) -> None:
    assert hooks.table_get("compat", "key") is None
    hooks.table_put("compat", "key", "one")
    hooks.table_put("compat", "key", "two")
    assert hooks.table_get("compat", "key") == "two"
    assert hooks.table_get("other", "key") is None


def test_a_job_has_ended_when_its_driver_has(address: str) -> None:
    assert not hooks.job_has_ended(ray.get_runtime_context().get_job_id())
    assert not hooks.job_has_ended("ffffffff"), "unknown"
    code = f"import ray; ray.init('{address}', log_to_driver=False); print(ray.get_runtime_context().get_job_id())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    other = done.stdout.split()[-1]
    until(lambda: hooks.job_has_ended(other), within_s=30)


def test_a_drained_node_is_listed_and_alive(address: str) -> None:
    """Last: the node takes no new work afterwards, and ends when it is idle."""

    busy = ray.remote(Busy).options(num_cpus=1).remote()
    assert ray.get(busy.ready.remote())
    node = ray.get_runtime_context().get_node_id()
    assert hooks.draining_nodes() == set()
    gcs = ray.get_runtime_context().gcs_address
    accepted, refusal = hooks.drain_node(gcs, node, "the test's notice", int((time.time() + 3600) * 1000))
    assert (accepted, refusal) == (True, "")
    until(lambda: hooks.draining_nodes() == {node}, within_s=20)
    assert [one["Alive"] for one in ray.nodes()] == [True]


def test_importing_the_hooks_imports_no_library() -> None:
    code = (
        "import sys, graftwork.compat.ray, graftwork.compat.hf\n"
        "print([name for name in ('ray', 'torch', 'trl', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
