"""A training run loses a host, and its client is cut off for a while: status stays true, the run goes on."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.hosts.network import Host, Network, network
from tests.hosts.nodes import RayCluster, graftwork, ray_cluster
from tests.training import task
from tests.waiting import until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
STEPS, STEPS_AN_EPOCH = 1200, 6


@dataclass(frozen=True)
class Hosts:
    """A head without CPUs, two workers of one each, a client."""

    made: Network
    cluster: RayCluster
    workers: list[Host]
    client: Host

    def status(self, job_id: str) -> dict[str, str]:
        said = graftwork(
            self.cluster,
            "jobs",
            "status",
            job_id,
            "--root",
            str(self.cluster.folder / "root"),
            "--json",
            host=self.client,
        )
        found: dict[str, str] = json.loads(said.stdout)
        return found

    def steps(self) -> int:
        """Newest step of the run."""
        rows = [
            line
            for path in self.cluster.folder.glob("root/runs/*/metrics.jsonl")
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        return int(json.loads(rows[-1])["step"]) if rows else 0


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with network() as made, ray_cluster() as cluster:
        head, *workers, client = [made.add() for _ in range(4)]
        cluster.start(head, "--num-cpus", "0")
        for node in [cluster.join(host, "--num-cpus", "1") for host in workers]:
            node.wait_up()
        yield Hosts(made, cluster, workers, client)


def test_a_run_goes_on_without_a_worker_that_is_cut_off_and_without_its_client(hosts: Hosts) -> None:
    spec = task(
        hosts.cluster.folder / "t",
        **{
            "name": "cut",
            "root": str(hosts.cluster.folder / "root"),
            "num_workers": 2,
            "checkpoint_every": 10,
            "eval_every": STEPS,
            "optim.epochs": STEPS // STEPS_AN_EPOCH,
            "recovery": {"min_workers": 1, "wait_s": 5},
        },
    )
    file = hosts.cluster.folder / "spec.json"
    file.write_text(json.dumps({"kind": "train", **spec.model_dump(mode="json", exclude_unset=True)}))
    sent = graftwork(hosts.cluster, "train", str(file), "--target", hosts.cluster.on, "--detach", host=hosts.client)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    job_id = next(path.name for path in (hosts.cluster.folder / "root" / "jobs").iterdir())
    until(lambda: hosts.steps() > 15, lambda: str(hosts.status(job_id)), within_s=200)

    hosts.made.cut(hosts.client)
    assert hosts.status(job_id)["state"] == "running", "the store says so where the cluster is out of reach"
    hosts.made.cut(hosts.workers[1])
    cut_at, reached = time.monotonic(), hosts.steps()
    hosts.made.restore(hosts.client)
    until(lambda: hosts.steps() > reached + 20, lambda: str(hosts.status(job_id)), within_s=240)
    print(f"{time.monotonic() - cut_at:.0f} s from the cut to 20 steps beyond it")
    assert hosts.status(job_id)["state"] == "running"
    until(lambda: hosts.status(job_id)["state"] != "running", within_s=300)
    assert hosts.status(job_id)["state"] == "succeeded", hosts.status(job_id)
    assert hosts.steps() == STEPS
