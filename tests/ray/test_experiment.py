"""A live split and a shadow on an endpoint of two replicas on a real Ray, one of which is killed under traffic."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cluster.session import Session
from graftwork.serving.ab_test.log import LogRow, rules_of
from graftwork.serving.ab_test.log_reader import ExperimentLog
from graftwork.serving.ab_test.report import analyse_log
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.serving.client import Client
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.ports import free_port
from tests.tiny import write_tiny_base
from tests.waiting import until

TASKS = tuple(f"task{number}" for number in range(8))  # all of one home: one time in 2^7
HELLO = [{"role": "user", "content": "Hello"}]
USERS = 12


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    tmp = tmp_path_factory.mktemp("experiment")
    base = write_tiny_base(tmp / "base")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    for seed, task in enumerate(TASKS):
        folder = write_lora(base, tmp / task, seed, r=4, target_modules=["q_proj", "v_proj"])
        artifact.publish(store, task, folder, **facts(base_digest=digest, prompt={"system": None}), alias="latest")
    spec = ServeSpec.model_validate(
        {
            "base": str(base),
            "root": store.uri,
            "quant": {"kind": "none"},
            "port": free_port(),
            "num_replicas": 2,
            "num_cpus": 0.5,
            "name": "experimented",
            "engine": {"max_seq_len": 512, "num_threads": 1, "max_batch": 16},
            "arms": [
                {"name": name, "grammar": {"regex": f"[a-z]{{{n}}}"}} for name, n in (("quick", 2), ("slow", 200))
            ],
        }
    )
    with deploy(spec) as running:
        yield running


def homes(client: Client) -> dict[str, str]:
    """The replica of each task that is on one alone."""
    found: dict[str, list[str]] = {}
    for row in client.adapters():
        for ref in row["refs"]:
            found.setdefault(ref.partition("@")[0], []).append(row["replica"])
    return {task: replicas[0] for task, replicas in found.items() if len(set(replicas)) == 1}


def apart(endpoint: Endpoint, client: Client, tasks: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of tasks that are answered by different replicas, each by one. All are let go and asked for first."""
    versions = {
        entry["graftwork"]["adapter"]: entry["graftwork"]["adapter_version"]
        for entry in client.models()
        if entry["graftwork"].get("adapter")
    }
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
    log = ExperimentLog(Store(status(client, name)["log"]["uri"]), ())
    rows = [row for row in log.rows() if row.kind == "answer"]
    assert (log.health.duplicates, log.health.damaged) == (0, [])
    return rows


@pytest.mark.long
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


UNITS, PER_S = 600, 20.0


@pytest.mark.soak
@pytest.mark.parametrize("rated", [1.0, 0.3])
def test_an_arm_that_is_slower_and_no_worse_raises_no_alarm_at_any_look(endpoint: Endpoint, rated: float) -> None:
    """600 callers come at random times, with equal thumbs for both arms; `slow` writes 200 letters, `quick` two. Of the
    callers all, or 3 of 10, send their thumb, on the slow arm seconds later."""
    arms = [{"name": name, "model": f"arm/{name}", "weight": 0.5} for name in ("quick", "slow")]
    spec: dict[str, Any] = {
        "kind": "experiment",
        "name": f"latency{rated:g}".replace(".", "-"),
        "arms": arms,
        "control": "quick",
        "primary": {"name": "thumbs", "deadline_s": 20.0},
        "log_every_s": 0.2,
    }
    with endpoint.client() as client:
        client.experiment("start", spec=spec)
        looks = asyncio.run(callers(endpoint, client, spec["name"], rated))
        until(lambda: moved(endpoint, client, spec["name"]), within_s=120)
        client.experiment("stop", name=spec["name"])
        until(lambda: status(client, spec["name"])["log"]["waiting"] == 0)
        last = status(client, spec["name"])
    assert len(looks) > 20
    for judged in (*looks, last["judged"]):
        assert judged["blocked"] is None
        assert judged["contrasts"][0]["verdict"] in ("undecided", "equivalent")
    read = analyse_log(
        spec["name"], ExperimentLog(Store(last["log"]["uri"]), ()), rules_of(ExperimentSpec.model_validate(spec))
    )
    (contrast,) = read.contrasts
    assert (contrast.n, contrast.estimate, contrast.e_value) == tuple(
        last["judged"]["contrasts"][0][key] for key in ("n", "estimate", "e_value")
    ), "the log that is read again says what the endpoint said"
    assert sum(arm.counted for arm in read.arms) >= UNITS
    assert sum(arm.scored for arm in read.arms) == pytest.approx(rated * UNITS, rel=0.25)
    rows = list(ExperimentLog(Store(last["log"]["uri"]), ()).rows())
    times = {arm: [row.latency_ms for row in rows if row.arm == arm and row.latency_ms] for arm in ("quick", "slow")}
    assert np.median(times["slow"]) > 5 * np.median(times["quick"])
    order = [row.request_id for row in rows if row.kind == "assignment"]
    assert [row.request_id for row in rows if row.kind == "answer"] != order, "answers overtook one another"


async def callers(endpoint: Endpoint, client: Client, name: str, rated: float) -> list[dict[str, Any]]:
    """Ask and rate; returns the state at every look on the way."""
    rng, looks = np.random.default_rng(3), list[dict[str, Any]]()
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=400)
    async with (
        httpx.AsyncClient(base_url=str(endpoint.url), timeout=120, limits=limits) as http,
        asyncio.TaskGroup() as group,
    ):
        for number, gap in enumerate(rng.exponential(1 / PER_S, UNITS)):
            thumb = float(rng.random() < 0.8) if rng.random() < rated else None
            group.create_task(one_caller(http, f"experiment/{name}", f"user{number}", thumb, float(rng.random())))
            await asyncio.sleep(gap)
            if number % 20 == 0:
                looks.append((await asyncio.to_thread(status, client, name))["judged"])
    return looks


async def one_caller(http: httpx.AsyncClient, model: str, user: str, thumb: float | None, pause_s: float) -> None:
    body = {"model": model, "messages": HELLO, "max_tokens": 256, "user": user}
    answered = await http.post("/v1/chat/completions", json=body)
    assert answered.status_code == 200, answered.text
    if thumb is not None:
        await asyncio.sleep(pause_s * (4 if answered.headers["x-graftwork-arm"] == "slow" else 1))
        late = {"request_id": answered.json()["id"], "scores": {"thumbs": thumb}}
        rated = await http.post("/v1/feedback", json=late)
        assert rated.status_code == 200, rated.text


def moved(endpoint: Endpoint, client: Client, name: str) -> bool:
    """Another request moves the log's clock; true once all units of the run are counted."""
    ask(endpoint, f"experiment/{name}", f"clock{time.monotonic_ns()}")
    return bool(sum(arm["counted"] for arm in status(client, name)["judged"]["arms"]) >= UNITS)
