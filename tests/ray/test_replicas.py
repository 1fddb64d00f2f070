"""An endpoint of two engine replicas on a real Ray: where requests go, what all learn, what a lost one costs."""

import asyncio
import functools
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families as parse
from ray import serve

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cluster.session import Session
from graftwork.errors import ConfigError
from graftwork.prompts.render import Message
from graftwork.serving.client import ChatCall, Client
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts, list_adapters
from tests.engines import write_lora
from tests.ports import free_port
from tests.tiny import write_tiny_base
from tests.tiny_embedder import write_tiny_embedder
from tests.waiting import until

TASKS = tuple(f"task{number}" for number in range(16))  # all of one home: one time in 2^15
HELLO = (Message("user", "Hello"),)
LONG = 900
MAX_BATCH = 16  # a replica is overloaded from 2 requests on, an eighth of it


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("replicas") / "base")


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    tmp = tmp_path_factory.mktemp("store")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    for seed, task in enumerate((*TASKS, "next")):
        folder = write_lora(base, tmp / task, seed, r=4, target_modules=["q_proj", "v_proj"])
        name = "task0" if task == "next" else task
        known = facts(base_digest=digest, prompt={"system": None})
        artifact.publish(store, name, folder, **known, alias=None if task == "next" else "latest")
    return store


def spec_of(base: Path, store: Store, **changed: Any) -> ServeSpec:
    usual: dict[str, Any] = {
        "base": str(base),
        "root": store.uri,
        "quant": {"kind": "none"},
        "port": free_port(),
        "num_replicas": 2,
        "num_cpus": 0.5,
        "engine": {"max_seq_len": 1024, "num_threads": 1, "max_batch": MAX_BATCH},
    }
    return ServeSpec(**{**usual, **changed})


@pytest.mark.long
def test_an_endpoint_that_ends_lets_its_streams_end_first(ray_cluster: Session, base: Path, store: Store) -> None:
    """A stream that runs when the endpoint is taken down comes whole; a new request is no longer taken."""
    lines: list[str] = []
    streaming, ended = threading.Event(), threading.Event()
    body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1900, "stream": True}
    limits = {"max_seq_len": 2048, "num_threads": 1, "max_batch": MAX_BATCH}

    def read(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=200) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                streaming.set()
        ended.set()

    with ExitStack() as stack:
        endpoint = stack.enter_context(
            deploy(spec_of(base, store, name="drained", num_replicas=1, engine=limits, graceful_shutdown_timeout_s=120))
        )
        reader = threading.Thread(target=read, args=(endpoint.url,))
        reader.start()
        assert streaming.wait(60)
        serve.delete("drained", _blocking=False)
        with endpoint.client() as client:
            until(lambda: not client.ready())
        assert not ended.is_set(), "it was over before the endpoint went"
        reader.join(120)
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.soak  # a minute of waiting for Serve's autoscaler
def test_replicas_follow_the_load(ray_cluster: Session, base: Path, store: Store) -> None:
    autoscaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 0.5}
    spec = spec_of(base, store, name="scaled", num_replicas=1, autoscaling={**autoscaling, "downscale_delay_s": 1})
    with deploy(spec) as endpoint, endpoint.client() as client:
        assert len(live_replicas(client)) == 1
        stop = threading.Event()
        load = threading.Thread(target=lambda: asyncio.run(keep_asking(endpoint, stop)))
        load.start()
        until(lambda: len(live_replicas(client)) == 2)
        stop.set()
        load.join(120)
        until(lambda: len(live_replicas(client)) == 1)


async def keep_asking(endpoint: Endpoint, stop: threading.Event) -> None:
    """Twelve requests at a time, none of which may fail, until told to stop."""

    async def one() -> None:
        while not stop.is_set():
            await client.chat(ChatCall("base", HELLO, max_tokens=64))

    async with endpoint.async_client() as client:
        await asyncio.gather(*[one() for _ in range(12)])


def test_more_replicas_than_fit_are_refused(ray_cluster: Session, base: Path, store: Store) -> None:
    with (
        pytest.raises(ConfigError, match="num_cpus=3 for each of 2 replicas"),
        deploy(spec_of(base, store, name="many", num_cpus=3)),
    ):
        pytest.fail("it deployed")


def test_an_embedder_that_finds_no_place_next_to_the_engine_is_refused(
    ray_cluster: Session, base: Path, store: Store, tmp_path: Path
) -> None:
    embedder = {"uri": str(write_tiny_embedder(tmp_path / "embedder")), "num_cpus": 64}
    with (
        pytest.raises(ConfigError, match=r"embedder\.num_cpus=64 next to"),
        deploy(spec_of(base, store, name="both", embedder=embedder)),
    ):
        pytest.fail("it deployed")


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Session, base: Path, store: Store) -> Iterator[Endpoint]:
    with deploy(spec_of(base, store)) as running:
        yield running


def answered(client: Client) -> Counter[tuple[str, str]]:
    """Requests so far by (replica, adapter), as GET /metrics tells them."""
    text = client.metrics()
    found: Counter[tuple[str, str]] = Counter()
    for family in parse(text):
        for sample in family.samples:
            if sample.name == "graftwork_requests_total":
                found[sample.labels["replica"], sample.labels["adapter"]] += int(sample.value)
    return found


def resident(client: Client, task: str) -> set[str]:
    """Replicas that hold the task's adapter."""
    return {row["replica"] for row in client.adapters() if f"{task}@latest" in row["refs"] and row["state"] == "ready"}


def test_each_adapter_is_answered_at_its_home(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        before = answered(client)
        for _ in range(6):
            for task in TASKS:
                client.chat(ChatCall(f"base:{task}", HELLO, max_tokens=1))
        spread = answered(client) - before
        replicas = {replica for replica, adapter in spread}
        for task in TASKS:
            assert max(spread[replica, task] for replica in replicas) == 6, spread
        assert len({resident(client, task).pop() for task in TASKS}) == 2, "sixteen adapters have two homes"


def test_base_requests_go_to_both(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        before = answered(client)
        asyncio.run(ask(endpoint, [ChatCall(endpoint.base, HELLO, max_tokens=32)] * 24, concurrency=8))
        spread = answered(client) - before
        assert min(count for (replica, adapter), count in spread.items() if adapter == "") >= 3, spread  # fair is 12
        assert len(spread) == 2


async def ask(endpoint: Endpoint, calls: list[ChatCall], concurrency: int) -> None:
    places = asyncio.Semaphore(concurrency)

    async def one(call: ChatCall) -> None:
        async with places:
            await client.chat(call)

    async with endpoint.async_client() as client:
        await asyncio.gather(*[one(call) for call in calls])


def test_one_hot_adapter_makes_no_hot_spot(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        before = answered(client)
        asyncio.run(ask(endpoint, [ChatCall("base:task1", HELLO, max_tokens=32)] * 60, concurrency=12))
        spread = answered(client) - before
        assert resident(client, "task1") == {replica for replica, _ in spread}
        least = min(spread[replica, "task1"] for replica, _ in spread)
        assert least >= 6, spread  # about half of 60; a quarter until the router knows of the second home
        assert len(spread) == 2


def test_a_moved_alias_reaches_every_replica(endpoint: Endpoint, store: Store) -> None:
    versions = {m.version for m in list_adapters(store) if m.task == "task0"}
    (old,) = {aliases(store, "task0")["latest"]}
    (new,) = versions - {old}
    with endpoint.client() as client:
        artifact.promote(store, "task0", "latest", new)
        assert client.refresh("task0@latest") == new
        rows = [row for row in client.adapters() if "task0@latest" in row["refs"]]
        assert {(row["version"], row["state"]) for row in rows} == {(new, "ready")}
        assert len({row["replica"] for row in rows}) == 2
        for _ in range(8):
            assert client.chat(ChatCall("base:task0", HELLO, max_tokens=1)).adapter_version == new


def test_rays_own_metrics_tell_the_requests_too(endpoint: Endpoint) -> None:
    """Where Ray's Prometheus scrapes: the agent of the node. Ray brings them there every few seconds."""
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}

    def told() -> set[str]:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        names = ("requests_total", "ttft_seconds_bucket", "completion_tokens_total", "kv_tokens_limit")
        return {name for name in names if f"ray_graftwork_{name}{{" in text}

    with endpoint.client() as client:
        client.chat(ChatCall("base:task3", HELLO, max_tokens=4))
    until(lambda: len(told()) == 4)


@pytest.mark.long
def test_a_killed_replica_costs_its_own_requests_alone(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        replicas = {row["replica"]: row["pid"] for row in client.stats()["replicas"]}
        outcome: dict[str, str] = {}
        while not outcome:  # a busy replica's request may go to the other one, which then is a second home
            doomed, safe = two_homes(client)
            homes = {task: resident(client, task) for task in (doomed, safe)}
            for task, home in homes.items():  # what a replica has loaded is known to the router a second or two later
                until(functools.partial(lands, client, task, *home))
            (lost,) = homes[doomed]
            outcome = asyncio.run(kill_while_both_stream(endpoint, client, homes, replicas[lost]))
        assert outcome[safe] == "[DONE]"
        assert json.loads(outcome[doomed])["error"]["code"] == "engine_lost"
        until(lambda: len(live_replicas(client)) == 2 and lost not in live_replicas(client))
        assert client.chat(ChatCall(f"base:{doomed}", HELLO, max_tokens=1)).completion_tokens == 1
        assert client.ready()


def two_homes(client: Client) -> tuple[str, str]:
    """Two tasks, each held by one replica, and not the same: all are let go and asked for until there are such."""
    while True:
        homes = {task: resident(client, task) for task in TASKS}
        alone = [task for task, home in homes.items() if len(home) == 1]
        apart = [(a, b) for a in alone for b in alone if homes[a] != homes[b]]
        if apart:
            return apart[0]
        for task in TASKS:
            client.admin("unload", adapter=task)
            client.chat(ChatCall(f"base:{task}", HELLO, max_tokens=1))


def lands(client: Client, task: str, home: str) -> bool:
    """Whether a request for the task goes to `home`."""
    before = answered(client)
    client.chat(ChatCall(f"base:{task}", HELLO, max_tokens=1))
    return (answered(client) - before)[home, task] == 1


def live_replicas(client: Client) -> set[str]:
    return {row["replica"] for row in client.stats()["replicas"]}


async def kill_while_both_stream(
    endpoint: Endpoint, client: Client, homes: dict[str, set[str]], pid: int
) -> dict[str, str]:
    """The last event of each task's stream, after the process ended in the middle of both. Empty, and nobody killed,
    where a stream may run elsewhere than at its task's only home."""
    going = asyncio.Barrier(len(homes) + 1)

    async def one(http: httpx.AsyncClient, task: str) -> tuple[str, str]:
        said = [{"role": "user", "content": "Hello"}]
        body = {"model": f"base:{task}", "messages": said, "max_tokens": LONG, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            await going.wait()
            *_, last = [line async for line in lines if line]
            return task, last.removeprefix("data: ")

    async with httpx.AsyncClient(base_url=str(endpoint.url), timeout=120) as http:
        streams = [asyncio.create_task(one(http, task)) for task in homes]
        await going.wait()
        if any([await asyncio.to_thread(resident, client, task) != home for task, home in homes.items()]):
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            return {}
        os.kill(pid, signal.SIGKILL)
        return dict(await asyncio.gather(*streams))
