"""A serving endpoint takes another live config, or refuses it and serves on: real app, engine and store."""

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.serving.api.app import make_app
from graftwork.serving.api.auth import Keys
from graftwork.serving.live_config import LiveConfig
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.local_endpoint import local_backend
from tests.tiny import write_tiny_base

KEY = "a key"
PLAIN: dict[str, Any] = {"name": "plain", "max_new_tokens": 4}
TUNED: dict[str, Any] = {"name": "tuned", "adapter": "card@latest", "max_new_tokens": 4}
FIRST: dict[str, Any] = {"adapters": [], "arms": [PLAIN], "limits": {}, "experiments": []}


def split(plain: float, **changed: Any) -> dict[str, Any]:
    arms = [{"name": "plain", "weight": plain}, {"name": "tuned", "weight": 1 - plain}]
    return {"name": "ab", "control": "plain", "primary": "latency_ms", "arms": arms, **changed}


@dataclass
class World:
    """Store with a base and the versions of a task."""

    base: Path
    store: Store
    digest: str
    tmp: Path

    def publish(self, task: str, seed: int, **known: Any) -> str:
        folder = write_lora(
            self.base, self.tmp / f"{task}{seed}", seed, r=known.pop("rank", 2), target_modules=["q_proj"]
        )
        found = facts(**{"base_digest": self.digest, "prompt": {"system": None}, **known})
        return artifact.publish(self.store, task, folder, **found, alias="latest").version

    def play(self, act: Callable[[httpx.AsyncClient, LiveConfig], Coroutine[Any, Any, None]]) -> None:
        """Serve FIRST as a Serve config does, and act on it as the owner."""
        engine = {"max_seq_len": 256, "num_threads": 1, "max_rank": 8}
        spec = ServeSpec.model_validate(
            {"base": str(self.base), "root": self.store.uri, "quant": {"kind": "none"}, "engine": engine}
        )

        async def main() -> None:
            backend = await local_backend(spec)
            live = LiveConfig(spec, backend)
            app = make_app(live, backend, Keys({}, hashlib.sha256(KEY.encode()).hexdigest()))
            transport, headers = httpx.ASGITransport(app), {"authorization": f"Bearer {KEY}"}
            try:
                async with (
                    asyncio.timeout(60),
                    httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client,
                ):
                    await live.open(FIRST)
                    await act(client, live)
                    await live.experiments.close()
            finally:
                await asyncio.to_thread(backend.replica.stop)

        asyncio.run(main())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    base = write_tiny_base(tmp_path / "base")
    store = Store(str(tmp_path / "root"))
    made = World(base, store, base_model.resolve(BaseSpec(uri=str(base))).digest, tmp_path)
    made.publish("card", 0)
    return made


async def offer(client: httpx.AsyncClient, live: LiveConfig, **changed: Any) -> dict[str, Any]:
    """What the endpoint says of a config once it has made up its mind."""
    live.update({**FIRST, **changed})
    while True:
        told: dict[str, Any] = (await client.get("/v1/admin/config")).json()
        if not told["changing"]:
            return told
        await asyncio.sleep(0.01)


async def ask(client: httpx.AsyncClient, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **more}
    return await client.post("/v1/chat/completions", json=body)


def test_arms_adapters_and_limits_come_and_go(world: World) -> None:
    async def act(client: httpx.AsyncClient, live: LiveConfig) -> None:
        assert (await ask(client, "arm/plain")).status_code == 200
        assert (await ask(client, "arm/tuned")).status_code == 404
        assert (await offer(client, live, arms=[PLAIN, TUNED], adapters=["card@latest"]))["refused"] is None
        held = (await client.get("/v1/adapters")).json()["data"]
        assert [one["refs"] for one in held] == [["card@latest"]], "loaded before somebody asks"
        assert (await ask(client, "arm/tuned")).status_code == 200
        assert (await ask(client, "arm/plain", n=3)).status_code == 200
        told = await offer(client, live, arms=[TUNED], limits={"max_n": 2, "max_prompt_tokens": 5})
        assert (told["taken"], told["refused"]) == (3, None)
        assert (await ask(client, "arm/plain")).status_code == 404
        assert "at most 2" in (await ask(client, "arm/tuned", n=3)).text
        assert "max_prompt_tokens=5" in (await ask(client, "arm/tuned")).text
        assert "graftwork_live_config_changes_total 3" in (await client.get("/metrics")).text

    world.play(act)


def test_a_request_keeps_what_it_was_admitted_with(world: World) -> None:
    async def act(client: httpx.AsyncClient, live: LiveConfig) -> None:
        running = asyncio.create_task(ask(client, "arm/plain", max_tokens=150, ignore_eos=True))
        while not (await client.get("/v1/stats")).json()["engine"]["running"]:
            assert not running.done()
            await asyncio.sleep(0.001)
        await offer(client, live, arms=[TUNED], limits={"max_prompt_tokens": 1})
        answer = await running
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 150

    world.play(act)


def test_weights_move_with_the_config_and_a_ramp_by_hand_stays(world: World) -> None:
    async def weights(client: httpx.AsyncClient) -> dict[str, float]:
        (one,) = (await client.get("/v1/admin/experiments")).json()["data"]
        return {arm["name"]: arm["weight"] for arm in one["arms"]}

    async def act(client: httpx.AsyncClient, live: LiveConfig) -> None:
        two: dict[str, Any] = {"arms": [PLAIN, TUNED]}
        assert (await offer(client, live, **two, experiments=[split(0.5)]))["refused"] is None
        assert (await ask(client, "experiment/ab", user="u")).status_code == 200
        assert (await offer(client, live, **two, experiments=[split(0.9)]))["refused"] is None
        assert (await weights(client))["plain"] == pytest.approx(0.9)
        await live.experiments.ramp("ab", {"plain": 0.25, "tuned": 0.75})
        assert (await offer(client, live, **two, experiments=[split(0.9)], adapters=["card@latest"]))["refused"] is None
        assert await weights(client) == {"plain": 0.25, "tuned": 0.75}
        told = await offer(client, live, **two, experiments=[split(0.9, alpha=0.01)], limits={"max_n": 1})
        assert "changes alpha" in told["refused"]["why"]
        assert (await ask(client, "arm/plain", n=2)).status_code == 200, "nothing of a refused config holds"
        told = await offer(client, live, experiments=[split(0.5)])
        assert "arm/tuned" in told["refused"]["why"], "an arm of the experiment is gone"

    world.play(act)


async def damage(world: World, task: str, seed: int, how: Callable[[Path], None]) -> None:
    version = world.publish(task, seed)
    how(world.store.local_dir("adapters", task, version))


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


def swapped(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04" * 400)


def test_wrong_configs_are_refused_by_name_and_the_old_one_serves_on(world: World) -> None:
    world.publish("foreign", 1, base_digest="f" * 64)
    world.publish("large", 2, rank=16)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"adapters": ["nobody@latest"]}, "nobody"),
        ({"adapters": ["../../etc@latest"]}, "adapters"),
        ({"adapters": ["card@../../secret"]}, "adapters"),
        ({"adapters": ["foreign@latest"]}, "trained on base"),
        ({"adapters": ["large@latest"]}, "max_rank=8"),
        ({"adapters": ["pickled@latest"]}, "pickled"),
        ({"adapters": ["swapped@latest"]}, "swapped"),
        ({"arms": [PLAIN, {**TUNED, "adapter": "nobody@latest"}]}, "nobody"),
        ({"arms": [PLAIN, PLAIN]}, "names must differ"),
        ({"arms": [{**PLAIN, "max_new_tokens": 256}]}, "no room"),
        ({"arms": [{**PLAIN, "grammar": {"regex": "("}}]}, "regex"),
        ({"limits": {"max_n": 0}}, "max_n"),
        ({"experiments": [split(0.5)]}, "arm/tuned"),
        ({"base": "another"}, "not a live key"),
    ]

    async def act(client: httpx.AsyncClient, live: LiveConfig) -> None:
        await damage(world, "pickled", 3, pickled)
        await damage(world, "swapped", 4, swapped)
        served = (await client.get("/v1/admin/config")).json()["config"]
        for changed, named in bad:
            told = await offer(client, live, **{"limits": {"max_n": 1}, **changed})
            assert named in told["refused"]["why"], changed
            assert (told["config"], told["taken"], told["refused"]["waits"]) == (served, 1, False), changed
            assert (await ask(client, "arm/plain", n=2)).status_code == 200, changed
        assert "graftwork_live_config_refused 1" in (await client.get("/metrics")).text
        assert (await offer(client, live, limits={"max_n": 1}))["refused"] is None
        assert "graftwork_live_config_refused 0" in (await client.get("/metrics")).text

    world.play(act)


def test_a_new_ingress_begins_with_what_the_old_one_took(world: World) -> None:
    async def act(client: httpx.AsyncClient, live: LiveConfig) -> None:
        await offer(client, live, arms=[PLAIN, TUNED])
        shutil.rmtree(world.store.local_dir("adapters", "card"))
        successor = LiveConfig(live.spec.with_({"arms": [], "adapters": []}), live._backend)
        await successor.open({**FIRST, "adapters": ["nobody@latest"]})
        while successor.status()["changing"]:
            await asyncio.sleep(0.01)
        assert successor.catalog.arm("arm/tuned").adapter == "card@latest"
        assert "nobody" in successor.status()["refused"]["why"]

    world.play(act)
