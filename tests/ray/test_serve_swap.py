"""An endpoint on a real Ray while its adapters are replaced and its engine is killed."""

import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator

import httpx

from graftwork.artifacts import publish
from graftwork.prompts.render import Message
from graftwork.serving.client import ChatCall
from graftwork.serving.deploy import Endpoint
from graftwork.serving.load_test import Sent, burst, swap_under_load
from tests.serve_world import AUTH, FLIPS, NEW_TOKENS, QUESTIONS, World


def test_a_burst_over_five_swaps_fails_nothing_and_mixes_nothing(endpoint: Endpoint, world: World) -> None:
    """Each answer is that of the version it names; a request sent after a swap was confirmed gets the new version."""
    models = ("base:card", "base:agent", "base:card@latest", "base:third", "base")
    calls = [ChatCall(m, (Message("user", q),), max_tokens=NEW_TOKENS) for q, m in itertools.product(QUESTIONS, models)]
    sent, confirmed = asyncio.run(burst_with_swaps(endpoint, world, calls, at_least=300))
    assert len(sent) >= 300
    assert [one.error for one in sent if one.error] == []
    for one in sent:
        assert one.reply is not None
        version = one.reply.adapter_version
        assert one.reply.text == world.texts[version, one.call.messages[0].content]
        if one.call.model.startswith("base:card"):
            before = [new for asked, done, new in confirmed if done < one.began_s]
            since = [new for asked, done, new in confirmed if asked < one.ended_s][len(before) :]
            assert version in {before[-1] if before else world.versions["card"], *since}
    assert {world.versions["card"], *world.newer} <= {one.version for one in sent}
    with endpoint.client() as client:
        assert [a["version"] for a in client.adapters() if "card@latest" in a["refs"]] == [world.newer[-1]]
        assert client.stats()["engine"]["most_adapters_in_step"] >= 3


async def burst_with_swaps(
    endpoint: Endpoint, world: World, calls: list[ChatCall], at_least: int
) -> tuple[list[Sent], list[tuple[float, float, str]]]:
    """Swap `card@latest` to each newer version, 40 answers between swaps. Also (asked, confirmed, version) of each."""
    answered, grown, confirmed = 0, asyncio.Event(), list[tuple[float, float, str]]()

    def supply() -> Iterator[ChatCall]:
        for number in itertools.count():
            if len(confirmed) == FLIPS and answered >= max(at_least, quiet_from + 40):
                return
            yield calls[number % len(calls)]

    def count(now: int) -> None:
        nonlocal answered
        answered = now
        grown.set()

    async with endpoint.async_client() as client:
        began = time.perf_counter()
        running = asyncio.create_task(burst(client, supply(), concurrency=24, on_answer=count))
        for version in world.newer:
            quiet_from = answered
            while answered < quiet_from + 40:
                grown.clear()
                await grown.wait()
            asked = time.perf_counter() - began
            publish.promote(world.store, "card", "latest", version)
            assert await client.refresh("card@latest") == version
            quiet_from = answered
            confirmed.append((asked, time.perf_counter() - began, version))
        return await running, confirmed


def test_the_swap_report_counts_by_version(endpoint: Endpoint, world: World) -> None:
    old, new = world.newer[-1], world.versions["card"]
    calls = [ChatCall(model, (Message("user", "Hello"),), max_tokens=8) for model in ("base:card", "base:agent")] * 30
    report = asyncio.run(swap_under_load(endpoint, world.store, "card@latest", new, calls, concurrency=8))
    assert (report.requests, report.failed, report.stale, report.old, report.new) == (60, 0, 0, old, new)
    assert sum(report.by_version.values()) == 60
    assert report.by_version[world.versions["agent"]] == 30
    assert min(report.by_version[old], report.by_version[new]) > 0
    assert report.ttft_ms["base:card"].n == 30
    assert report.swap_ms > 0


def test_a_killed_engine_is_said_in_openais_shape_and_comes_back(endpoint: Endpoint, world: World) -> None:
    async def run(pid: int) -> tuple[httpx.Response, list[str]]:
        body = {"model": "base:card", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 900}
        async with httpx.AsyncClient(base_url=str(endpoint.url), headers=AUTH, timeout=60) as http:
            whole = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
                lines = stream.aiter_lines()
                seen = [await anext(lines)]
                while (await http.get("/v1/stats")).json()["engine"]["running"] < 2:  # neither waits outside the engine
                    assert not whole.done()
                os.kill(pid, signal.SIGKILL)
                seen += [line async for line in lines]
            return await whole, seen

    with endpoint.client() as client:
        whole, seen = asyncio.run(run(client.stats()["replicas"][0]["pid"]))
        assert whole.status_code == 503
        assert whole.json()["error"]["code"] == "engine_lost"
        assert json.loads([line for line in seen if line][-1].removeprefix("data: "))["error"]["code"] == "engine_lost"
        reply = client.chat(ChatCall("base:agent", (Message("user", "Hello"),), max_tokens=NEW_TOKENS))
        assert reply.text == world.texts[world.versions["agent"], "Hello"]
        assert client.ready()
