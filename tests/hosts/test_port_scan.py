"""A Ray cluster of docs/ray-cluster.md over three hosts, scanned from a fourth without the token."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.hosts.network import Host, network
from tests.hosts.nodes import GRPC, RayCluster, graftwork, port_table, ray_cluster
from tests.process_races import ROOT

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

PUBLIC = {
    "GET /",
    "GET /favicon.ico",
    "GET /static/",
    "GET /api/authentication_mode",
    "GET /api/healthz",
    "GET /api/gcs_healthz",
    "GET /api/local_raylet_healthz",
    "GET /-/healthz",
}
"""Of Ray's dashboard: the page without any data, whether a token is wanted, and whether Ray is well."""
REFUSED = {"UNAUTHENTICATED", "UNIMPLEMENTED"}
WORKERS = range(6390, 6590)


@dataclass(frozen=True)
class Hosts:
    """A head, two workers, and who is outside."""

    cluster: RayCluster
    nodes: list[Host]
    stranger: Host

    def tried(self, what: str, host: Host, *rest: str, env: Mapping[str, str] | None = None) -> Any:
        """What a stranger finds, see tests/hosts/port_scan.py."""
        command = [sys.executable, "-m", "tests.hosts.port_scan", what, host.ip, *rest]
        done = subprocess.run(
            self.stranger.command(*command),
            cwd=ROOT,
            env={**self.cluster.environment(), **(env or {})},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with network() as made, ray_cluster() as cluster:
        nodes = [made.add() for _ in range(3)]
        stranger = made.add()
        cluster.start(nodes[0], "--num-cpus", "1")
        for node in [cluster.join(host, "--num-cpus", "1") for host in nodes[1:]]:
            node.wait_up()
        spec = cluster.folder / "sleep.yaml"
        program = {"kind": "exec", "name": "sleep", "root": str(cluster.folder), "argv": ["sleep", "600"]}
        spec.write_text(json.dumps(program))
        sent = graftwork(cluster, "exec", str(spec), "--target", cluster.on, "--detach", host=stranger)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        yield Hosts(cluster, nodes, stranger)


def doors_of(number: int) -> dict[int, str]:
    """{port: process} of a node, as the page's table says."""
    return {port: what for port, (what, on) in port_table().items() if number == 0 or on == "every machine"}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_node_listens_on_the_pages_ports_and_tells_a_stranger_its_health_alone(hosts: Hosts, number: int) -> None:
    host, table = hosts.nodes[number], doors_of(number)
    found = hosts.tried("ports", host)
    assert [port for port in found if port not in table and port not in WORKERS] == []
    assert set(table) <= set(found)
    for port in found:
        answered = set(hosts.tried("http", host, str(port)))
        what = table.get(port, "worker processes")
        if what == "dashboard and Jobs API":
            assert answered <= PUBLIC | {"POST /api/authenticate"}
        elif what.startswith("metrics"):
            assert {path.split()[1] for path in answered} >= {"/metrics"}
        elif what == "agent (HTTP)":
            assert answered == {"GET /api/healthz", "GET /api/local_raylet_healthz"}
        else:
            assert answered == set(), what
        if what in GRPC:
            said = hosts.tried("grpc", host, str(port))
            assert set(said.values()) <= REFUSED, (what, said)
            assert "UNAUTHENTICATED" in said.values(), (what, said)


def test_the_gcs_takes_its_own_token_alone(hosts: Hosts) -> None:
    port = str(hosts.cluster.port)
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(hosts.cluster.token_file)}
    assert hosts.tried("gcs", hosts.nodes[0], port, env=right) == "welcome"
    for wrong in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        assert hosts.tried("gcs", hosts.nodes[0], port, env=wrong) == "AuthenticationError"


def test_a_wrong_token_neither_submits_nor_joins(hosts: Hosts) -> None:
    home = hosts.cluster.folder / "wrong"
    wrong = home / ".ray" / "auth_token"
    wrong.parent.mkdir(parents=True)
    wrong.touch(mode=0o600)
    wrong.write_text("f" * 64)
    spec = hosts.cluster.folder / "job.yaml"
    spec.write_text(json.dumps({"kind": "exec", "name": "x", "root": str(hosts.cluster.folder), "argv": ["true"]}))
    env = {**hosts.cluster.environment(), "RAY_AUTH_TOKEN_PATH": str(wrong)}
    sent = graftwork(hosts.cluster, "exec", str(spec), "--target", hosts.cluster.on, host=hosts.stranger, env=env)
    assert sent.returncode == 3, sent.stdout + sent.stderr
    assert "403" in sent.stderr
    env.pop("RAY_AUTH_TOKEN_PATH")
    sent = graftwork(hosts.cluster, "exec", str(spec), "--target", hosts.cluster.on, host=hosts.stranger, env=env)
    assert sent.returncode == 3, sent.stdout + sent.stderr
    assert "401" in sent.stderr
    joined = hosts.cluster.join(hosts.stranger, home=home)
    assert joined.process.wait(60) != 0
    assert "AuthenticationError" in joined.said()
    secret = hosts.cluster.token_file.read_text()
    assert secret not in joined.said() + sent.stdout + sent.stderr
