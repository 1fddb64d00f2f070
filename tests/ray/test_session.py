"""A private Ray leaves no open door and nothing behind; an existing Ray runs a command, or refuses it with a reason."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import psutil
import pytest

from graftwork.cluster.private_ray import DIR_PREFIX
from tests.ports import free_port
from tests.process_races import ROOT

UP_WITHIN_S = 120.0
TOKEN = "0123456789abcdef" * 3
RAYS_OWN_PORTS = {6379, 8265, 10001, 52365}
"""Ray's defaults for GCS, dashboard, clients and the dashboard's agent: a private Ray leaves them to others."""

PRIVATE = """
import json, os, sys, tempfile
from graftwork.cluster.session import session
tempfile.tempdir = sys.argv[1]
with session("local") as here:
    import ray
    cpus = ray.cluster_resources()["CPU"]
    where = ray.get(ray.remote(lambda: __import__("graftwork").__file__).remote())
    print(json.dumps([here.address, cpus, where, os.environ["RAY_AUTH_TOKEN"]]), flush=True)
    sys.stdin.readline()
print(json.dumps([os.environ.get("RAY_AUTH_TOKEN"), ray.is_initialized()]))
"""

SUBMIT = """
import sys
from graftwork.cluster.targets.ray_jobs import run_command
from graftwork.errors import GraftworkError

try:
    sys.exit(run_command(sys.argv[1], sys.argv[2:]))
except GraftworkError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def without_ray() -> dict[str, str]:
    """This environment without the marks of the Ray that other tests of the session use."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def start(program: str, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program, *argv]
    return subprocess.Popen(
        command, env=env or without_ray(), cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    )


def line(stream: IO[str] | None) -> list[object]:
    assert stream is not None
    found: list[object] = json.loads(stream.readline())
    return found


@pytest.fixture
def short_temp() -> Iterator[Path]:
    """A temp dir with a short path, as Ray's sockets need."""
    with tempfile.TemporaryDirectory(prefix="gwt-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("ending", ["done", signal.SIGINT, signal.SIGTERM])
def test_a_private_ray_listens_on_loopback_alone_and_leaves_nothing(short_temp: Path, ending: str | int) -> None:
    left = short_temp / f"{DIR_PREFIX}left"  # by an owner that was killed: it goes with the next start
    (left / "session").mkdir(parents=True)
    process = start(PRIVATE, str(short_temp))
    address, cpus, where, token = line(process.stdout)
    assert not left.exists()
    assert str(address).startswith("127.0.0.1:")
    assert isinstance(cpus, float)
    assert cpus >= 2
    assert where == str(ROOT / "graftwork" / "__init__.py")
    assert len(str(token)) == 64
    below = psutil.Process(process.pid).children(recursive=True)
    heard = {place for member in [psutil.Process(process.pid), *below] for place in listening(member)}
    assert {address for address, _ in heard} == {"127.0.0.1"}
    assert not {port for _, port in heard} & RAYS_OWN_PORTS
    started = " ".join(word for member in below for word in member.cmdline())
    assert "raylet" in started
    assert not [helper for helper in ("dashboard.py", "monitor.py") if helper in started], "nobody needs them here"
    assert [path.name for path in short_temp.iterdir() if path.name.startswith(DIR_PREFIX)]
    if ending == "done":
        said, _ = process.communicate("\n", timeout=200)
        assert json.loads(said) == [None, False], "the environment is put back"
        assert process.returncode == 0
    else:
        process.send_signal(int(ending))
        _, trace = process.communicate(timeout=200)
        assert "KeyboardInterrupt" in trace
    assert psutil.wait_procs(below, timeout=60)[1] == []
    assert list(short_temp.iterdir()) == []


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses and ports that a process accepts connections on, IPv4 in IPv6 unwrapped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = process.net_connections("inet")
        return {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}
    return set()


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of a Ray that somebody else runs, with a token."""
    ports = [free_port() for _ in range(3)]
    with tempfile.TemporaryDirectory(prefix="gwr-", dir="/tmp") as folder:
        environment = {
            **without_ray(),
            "PYTHONPATH": "",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        command = ["ray", "start", "--head", "--block", "--num-cpus=3", f"--temp-dir={folder}", "--disable-usage-stats"]
        command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=true"]
        # the default, 52365, belongs to the first Ray of a machine; without a port an agent lives and takes no jobs
        command.append(f"--dashboard-agent-listen-port={ports[2]}")
        with open(Path(folder) / "head.log", "w", encoding="utf-8") as log:
            head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(ports[1], head)
            yield f"http://127.0.0.1:{ports[1]}"
        finally:
            below = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(timeout=120)
            for process in psutil.wait_procs(below, timeout=20)[1]:
                process.kill()


def wait_for(port: int, head: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + UP_WITHIN_S
    while head.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.1)
    pytest.fail(f"the existing Ray does not listen on {port}")


@pytest.mark.long
def test_an_existing_ray_runs_a_command_with_its_token_and_refuses_without(dashboard: str, tmp_path: Path) -> None:
    """Two processes at once: with the cluster's token, and with a wrong one."""
    (tmp_path / "bad.yaml").write_text("kind: train\nnam: x\n")
    argv = (dashboard, "config", "check")
    right = start(SUBMIT, *argv, str(tmp_path / "bad.yaml"), env={**without_ray(), "RAY_AUTH_TOKEN": TOKEN})
    wrong = start(SUBMIT, *argv, "x.yaml", env={**without_ray(), "RAY_AUTH_TOKEN": "f" * 48})

    said, errors = right.communicate(timeout=200)
    assert right.returncode == 2, said + errors
    assert "nam: unknown key (value 'x')" in said, "the command's own message and exit code come back"
    assert str(ROOT) not in said, "it ran on the code that was shipped"

    said, errors = wrong.communicate(timeout=200)
    assert wrong.returncode == 3, said + errors
    assert "refused the connection" in said
    assert "RAY_AUTH_TOKEN" in said
