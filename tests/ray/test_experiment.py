"""A live split and a shadow on an endpoint of two replicas on a real Ray, one of which is killed under traffic."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from graftwork import artifact, base_model
from graftwork.base_model import BaseSpec
from graftwork.cluster.session import Session
from graftwork.serving.app import Endpoint, deploy
from graftwork.serving.client import Client
from graftwork.serving.experiment.online.log_reader import ExperimentLog
from graftwork.serving.experiment.online.log_row import LogRow
from graftwork.serving.spec import ServeSpec
from graftwork.storage import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.ports import free_port
from tests.tiny import write_tiny_base

TASKS = tuple(f"task{number}" for number in range(8))  # all of one home: one time in 2^7
HELLO = [{"role": "user", "content": "Hello"}]
USERS = 12


@pytest.fixture(scope="module")
def endpoint(local_ray: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    tmp = tmp_path_factory.mktemp("experiment")
    base = write_tiny_base(tmp / "base")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    for seed, task in enumerate(TASKS):
        folder = write_lora(base, tmp / task, seed, r=4, target_modules=["q_proj", "v_proj"])
        artifact.publish(store, task, folder, **facts(base_digest=digest, prompt={"system": None}), alias="latest")
    spec = ServeSpec.model_validate({
        "base": str(base), "root": store.uri, "quant": {"kind": "none"}, "port": free_port(), "num_replicas": 2,
        "num_cpus": 0.5, "name": "experimented", "engine": {"max_seq_len": 512, "num_threads": 1, "max_batch": 16},
    })  # fmt: skip
    with deploy(spec) as running:
        yield running


def until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.1)


def homes(client: Client) -> dict[str, str]:
    """The replica of each task that is on one alone."""
    found: dict[str, list[str]] = {}
    for row in client.adapters():
        for ref in row["refs"]:
            found.setdefault(ref.partition("@")[0], []).append(row["replica"])
    return {task: replicas[0] for task, replicas in found.items() if len(set(replicas)) == 1}


def apart(endpoint: Endpoint, client: Client, tasks: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of tasks that are answered by different replicas, each by one. All are let go and asked for first."""
    versions = {entry["graftwork"]["adapter"]: entry["graftwork"]["adapter_version"]
                for entry in client.models() if entry["graftwork"].get("adapter")}  # fmt: skip
    for task in tasks:
        client.admin("unload", adapter=f"{task}@{versions[task]}")
        assert ask(endpoint, f"base:{task}@{versions[task]}").status_code == 200
    found = homes(client)
    return [(a, b) for a in tasks for b in tasks if a in found and b in found and found[a] != found[b]]


def ask(endpoint: Endpoint, model: str, user: str = "u", tokens: int = 2) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": tokens, "user": user, "ignore_eos": True}
    return httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60)


def begin(client: Client, name: str, control: str, other: str, **changed: Any) -> dict[str, Any]:
    arms: list[dict[str, Any]] = [
        {"name": "first", "model": f"base:{control}"},
        {"name": "second", "model": f"base:{other}"},
    ]
    if changed.get("mode") != "shadow":
        arms = [{**arm, "weight": 0.5} for arm in arms]
    spec = {"kind": "experiment", "name": name, "arms": arms, "control": "first", "primary": "thumbs", **changed}
    return client.experiment("start", spec=spec)


def status(client: Client, name: str) -> dict[str, Any]:
    return next(one for one in client.experiments() if one["name"] == name)


def written(client: Client, name: str) -> list[LogRow]:
    until(lambda: status(client, name)["log"]["waiting"] == 0)
    log = ExperimentLog.at(status(client, name)["log"]["uri"])
    rows = [row for row in log.rows() if row.kind == "answer"]
    assert (log.health.duplicates, log.health.damaged) == (0, [])
    return rows


def test_both_survive_a_killed_replica(endpoint: Endpoint) -> None:
    """The replica of the second arm dies: callers of the shadow notice nothing, those of the split lose what was there
    alone, and afterwards everybody has the arm they had."""
    with endpoint.client() as client:
        control, other = apart(endpoint, client, TASKS)[0]
        begin(client, "split", control, other)
        begin(client, "unseen", control, other, mode="shadow", shadow_concurrency=2)
        replicas = {row["replica"]: row["pid"] for row in client.stats()["replicas"]}
        before = [ask(endpoint, "experiment/split", f"user{user}") for user in range(USERS)]
        arms = [response.headers["x-graftwork-arm"] for response in before]
        assert set(arms) == {"first", "second"}
        seen = [ask(endpoint, "experiment/unseen", f"user{n}", tokens=24) for n in range(4)]
        until(lambda: status(client, "unseen")["shadow"]["waiting"] == 0)
        until(lambda: bool(apart(endpoint, client, (control, other))))  # copies may have given one a second home
        found = homes(client)
        os.kill(replicas[found[other]], signal.SIGKILL)
        seen += [ask(endpoint, "experiment/unseen", f"user{n}", tokens=8) for n in range(8)]
        during = [ask(endpoint, "experiment/split", f"user{user}") for user in range(USERS)]
        until(lambda: pids(client) > {replicas[found[control]]} and replicas[found[other]] not in pids(client))
        after = [ask(endpoint, "experiment/split", f"user{user}") for user in range(USERS)]
        assert [response.headers["x-graftwork-arm"] for response in after] == arms
        assert {response.status_code for response in (*before, *after, *seen)} == {200}
        split_is_whole(client, [*before, *during, *after])
        shadow_is_whole(client, {response.json()["id"] for response in seen})


def pids(client: Client) -> set[int]:
    """Processes of the engine replicas."""
    return {row["pid"] for row in client.stats()["replicas"]}


def split_is_whole(client: Client, answered: list[httpx.Response]) -> None:
    """One row a request, those that failed among them, and one arm a unit."""
    rows = written(client, "split")
    told = {row.request_id for row in rows}
    assert len(told) == len(rows) == len(answered) == 3 * USERS
    assert {response.json()["id"] for response in answered if response.status_code == 200} <= told
    assert sum(row.error is not None for row in rows) == sum(r.status_code != 200 for r in answered)
    by_unit = {row.unit: {one.arm for one in rows if one.unit == row.unit} for row in rows}
    assert [len(found) for found in by_unit.values()] == [1] * USERS


def shadow_is_whole(client: Client, seen: set[str]) -> None:
    """Every prompt has the row that was seen, and the copy's, answered or failed."""
    until(lambda: status(client, "unseen")["shadow"]["waiting"] == 0)
    rows = written(client, "unseen")
    assert {row.request_id for row in rows if row.role == "primary"} == seen
    assert {row.request_id for row in rows if row.role == "shadow"} == seen
    assert len(rows) == 2 * len(seen)
    assert all(row.error is None for row in rows if row.role == "primary")
