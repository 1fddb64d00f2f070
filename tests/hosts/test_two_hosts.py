"""A head and a client on two hosts, for half a minute: the soaks of this folder in short, as CI runs them."""

import json

import pytest

from tests.hosts.network import network
from tests.hosts.nodes import graftwork, ray_cluster
from tests.hosts.test_port_scan import WORKERS, Hosts, doors_of
from tests.waiting import until


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_head_opens_the_pages_ports_alone_and_its_job_outlasts_a_cut_client() -> None:
    with network() as made, ray_cluster() as cluster:
        head, client = made.add(), made.add()
        cluster.start(head, "--num-cpus", "1")
        root = ("--root", str(cluster.folder))
        spec = cluster.folder / "sleep.json"
        spec.write_text(json.dumps({"kind": "exec", "name": "sleep", "root": root[1], "argv": ["sleep", "600"]}))
        sent = graftwork(cluster, "exec", str(spec), "--target", cluster.on, "--detach", host=client)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        [job] = [path.name for path in (cluster.folder / "jobs").iterdir()]

        def state() -> str:
            said = graftwork(cluster, "jobs", "status", job, *root, "--json", host=client)
            return str(json.loads(said.stdout)["state"])

        until(lambda: state() == "running")
        hosts = Hosts(cluster, [head], client)
        found, table = set(hosts.tried("ports", head)), set(doors_of(0))
        assert table <= found <= table | set(WORKERS)
        for wrong in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}):
            assert hosts.tried("gcs", head, str(cluster.port), env=wrong) == "AuthenticationError"

        made.cut(client)
        assert state() == "running", "the store says so where the cluster is out of reach"
        made.restore(client)
        ended = graftwork(cluster, "jobs", "cancel", job, *root, host=client)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert state() == "cancelled"
