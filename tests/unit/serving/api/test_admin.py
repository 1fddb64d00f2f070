"""What the owner of an endpoint does with adapters, over HTTP: real app, engine and store; and who may not."""

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
from graftwork.artifacts.manifest import aliases
from graftwork.artifacts.registry import verify_adapter
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.serving.api.auth import Keys
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts, list_adapters
from tests.engines import write_lora
from tests.local_endpoint import local_client
from tests.tiny import write_tiny_base

ADMIN = "/v1/admin/adapters"
USER_KEY, ADMIN_KEY = "user key", "admin key"
KEYS = Keys({"someone": hashlib.sha256(USER_KEY.encode()).hexdigest()}, hashlib.sha256(ADMIN_KEY.encode()).hexdigest())


@dataclass
class World:
    """A base, its digest, three PEFT folders, a store, and a second place where adapters are published."""

    base: Path
    digest: str
    folders: list[Path]
    store: Store
    elsewhere: Store

    def publish(self, number: int, alias: str | None = "latest", store: Store | None = None, **changed: Any) -> str:
        known = facts(**{"base_digest": self.digest, "prompt": {}, **changed})
        return artifact.publish(store or self.store, "card", self.folders[number], **known, alias=alias).version

    def spec(self, **changed: Any) -> ServeSpec:
        usual: dict[str, Any] = {
            "base": str(self.base),
            "root": self.store.uri,
            "quant": {"kind": "none"},
            "engine": {"max_seq_len": 128, "num_threads": 1},
            "adapter_roots": [self.elsewhere.uri],
        }
        return ServeSpec(**{**usual, **changed})

    def play(
        self, act: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], keys: Keys | None = None, **changed: Any
    ) -> None:
        async def main() -> None:
            async with local_client(self.spec(**changed), keys) as client:
                await act(client)

        asyncio.run(main())


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[Path]]:
    tmp = tmp_path_factory.mktemp("admin")
    base = write_tiny_base(tmp / "base")
    digest = base_model.resolve(BaseSpec(uri=str(base))).digest
    return base, digest, [write_lora(base, tmp / str(n), n, r=2, target_modules=["q_proj"]) for n in range(3)]


@pytest.fixture
def world(parts: tuple[Path, str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return World(*parts, Store(str(tmp_path / "root")), Store(str(tmp_path / "elsewhere")))


async def do(client: httpx.AsyncClient, verb: str, **body: Any) -> list[dict[str, Any]]:
    response = await client.post(f"{ADMIN}/{verb}", json=body)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


async def ask(client: httpx.AsyncClient, model: str = "base:card") -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    return await client.post("/v1/chat/completions", json=body)


async def rows(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    response = await client.get(ADMIN)
    return {row["version"]: row for row in response.json()["data"]}


def test_the_life_of_an_adapter_on_an_endpoint(world: World) -> None:
    first = world.publish(0, "prod")

    async def act(client: httpx.AsyncClient) -> None:
        assert (await rows(client))[first] | {"tier": "disk", "state": "registered", "aliases": ["prod"]} == (
            await rows(client)
        )[first]
        assert await do(client, "load", adapter="card@prod") == [{"adapter": "card@prod", "version": first}]
        loaded = (await rows(client))[first]
        assert (loaded["tier"], loaded["state"], loaded["running"]) == ("host", "ready", 0)
        assert loaded["host_bytes"] > 0
        assert (await ask(client, "base:card@prod")).headers["x-graftwork-adapter-version"] == first
        assert (await rows(client))[first]["tier"] == "slot"
        await do(client, "pin", adapter="card@prod")
        assert (await rows(client))[first]["pinned"] is True
        second = world.publish(1, None)
        done = await do(client, "promote", adapter="card@prod", version=second)
        assert (done[0]["old"], done[0]["new"]) == (first, second)
        assert aliases(world.store, "card") == {"prod": second}
        assert (await ask(client, "base:card@prod")).json()["graftwork"]["adapter_version"] == second
        assert (await do(client, "rollback", adapter="card@prod"))[0]["new"] == first
        assert (await ask(client, "base:card@prod")).json()["graftwork"]["adapter_version"] == first
        await do(client, "unload", adapter="card@prod")
        assert (await rows(client))[first]["state"] == "registered"
        assert (await ask(client, "base:card@prod")).json()["graftwork"]["adapter_version"] == first

    world.play(act)


def test_an_endpoint_follows_an_alias_that_moved_without_it(world: World) -> None:
    """As when training publishes: the endpoint is told afterwards, and can go back."""
    first = world.publish(0, "prod")

    async def act(client: httpx.AsyncClient) -> None:
        await ask(client, "base:card@prod")
        second = world.publish(1, "prod")
        assert (await ask(client, "base:card@prod")).headers["x-graftwork-adapter-version"] == first
        done = await do(client, "promote", adapter="card@prod", version="prod")
        assert (done[0]["old"], done[0]["new"]) == (first, second)
        assert (await ask(client, "base:card@prod")).headers["x-graftwork-adapter-version"] == second
        done = await do(client, "rollback", adapter="card@prod")
        assert (done[0]["old"], done[0]["new"]) == (second, first)
        assert (await ask(client, "base:card@prod")).headers["x-graftwork-adapter-version"] == first

    world.play(act)


def test_an_alias_does_not_move_to_what_cannot_be_served(world: World) -> None:
    first, broken = world.publish(0, "prod"), world.publish(1, None)
    weights = Path(world.store.path("adapters", "card", broken, "adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")

    async def act(client: httpx.AsyncClient) -> None:
        body = {"adapter": "card@prod", "version": broken}
        response = await client.post(f"{ADMIN}/promote", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_not_servable")
        assert "sha256" in response.json()["error"]["message"]
        assert aliases(world.store, "card") == {"prod": first}
        assert (await ask(client, "base:card@prod")).json()["graftwork"]["adapter_version"] == first

    world.play(act)


def test_a_version_from_an_allowed_place_is_registered_and_served(world: World) -> None:
    version = world.publish(0, None, world.elsewhere)
    place = world.elsewhere.path("adapters", "card", version)

    async def act(client: httpx.AsyncClient) -> None:
        done = await do(client, "register", uri=place, alias="prod")
        assert done[0]["new"] == version
        answer = await ask(client, "base:card@prod")
        assert answer.json()["graftwork"]["adapter_version"] == version

    world.play(act)
    assert verify_adapter(world.store, "card", version) == []


def test_what_may_not_be_registered(world: World, tmp_path: Path) -> None:
    """Each place is refused with 400 and a reason, and the store stays empty."""
    version = world.publish(0, None, world.elsewhere)
    foreign = world.publish(0, None, world.elsewhere, base_digest="f" * 64)
    good = Path(world.elsewhere.path("adapters", "card", version))
    root = Path(world.elsewhere.uri)

    def variant(name: str, change: Callable[[Path], object]) -> str:
        shutil.copytree(good, root / name)
        change(root / name)
        return str(root / name)

    def flipped(folder: Path) -> None:
        data = bytearray((folder / "adapter_model.safetensors").read_bytes())
        data[-3] ^= 1
        (folder / "adapter_model.safetensors").write_bytes(data)

    def linked(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").symlink_to(good / "manifest.json")

    outside = tmp_path / "outside"
    shutil.copytree(good, outside)
    (root / "link").symlink_to(outside)
    refused = {
        str(outside): "none of the allowed roots",
        f"{root}/../outside": "none of the allowed roots",
        f"{root}/x/%2e%2e/outside": "none of the allowed roots",
        f"{root}//adapters": "none of the allowed roots",
        str(root / "link"): "link",
        str(root / "nothing-there"): "manifest.json",
        world.elsewhere.path("adapters", "card", foreign): "trained on base",
        variant("pickle", lambda f: (f / "adapter_model.bin").write_bytes(b"\x80\x04.")): "adapter_model.bin",
        variant("script", lambda f: (f / "setup.py").write_text("")): "setup.py",
        variant("short", lambda f: (f / "adapter_config.json").write_text("{}")): "adapter_config.json has 2 bytes",
        variant("flipped", flipped): "sha256",
        variant("linked", linked): "link",
        variant(
            "renamed",
            lambda f: (f / "manifest.json").write_text((good / "manifest.json").read_text().replace(version, "0" * 12)),
        ): "digest of its content",
        variant(
            "upper",
            lambda f: (f / "manifest.json").write_text(
                (good / "manifest.json").read_text().replace('"card"', '"../Card"')
            ),
        ): "task",
    }

    async def act(client: httpx.AsyncClient) -> None:
        for uri, why in refused.items():
            response = await client.post(f"{ADMIN}/register", json={"uri": uri})
            assert response.status_code == 400, (uri, response.text)
            assert why in response.json()["error"]["message"], (uri, response.text)

    world.play(act)
    assert list_adapters(world.store) == []


def test_what_the_engine_cannot_serve_is_not_registered(world: World) -> None:
    version = world.publish(0, None, world.elsewhere)

    async def act(client: httpx.AsyncClient) -> None:
        uri = world.elsewhere.path("adapters", "card", version)
        response = await client.post(f"{ADMIN}/register", json={"uri": uri})
        assert response.status_code == 400
        assert "max_rank=1" in response.json()["error"]["message"]

    world.play(act, engine={"max_seq_len": 128, "num_threads": 1, "max_rank": 1})
    assert list_adapters(world.store) == []


@pytest.mark.parametrize(
    ("keys", "given", "admin_status", "user_status"),
    [
        (KEYS, None, 401, 401),
        (KEYS, "wrong", 401, 401),
        (KEYS, USER_KEY, 403, 200),
        (KEYS, ADMIN_KEY, 200, 200),
        (Keys(KEYS.users), USER_KEY, 403, 200),
        (Keys(KEYS.users), ADMIN_KEY, 401, 401),
        (Keys(admin=KEYS.admin), None, 401, 200),
        (Keys(admin=KEYS.admin), ADMIN_KEY, 200, 200),
        (Keys(), None, 200, 200),
    ],
)
def test_who_may_do_what(world: World, keys: Keys, given: str | None, admin_status: int, user_status: int) -> None:
    world.publish(0)
    headers = {} if given is None else {"authorization": f"Bearer {given}"}

    async def act(client: httpx.AsyncClient) -> None:
        client.headers.update(headers)
        assert (await client.get("/v1/models")).status_code == user_status
        assert (await client.get(ADMIN)).status_code == admin_status
        response = await client.post(f"{ADMIN}/load", json={"adapter": "card"})
        assert response.status_code == admin_status
        assert (admin_status == 200) == ("data" in response.json())
        assert (await client.get("/v1/adapters")).status_code == user_status

    world.play(act, keys)


def test_an_unknown_adapter_is_404_for_every_verb(world: World) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        for verb in ("load", "pin", "unpin", "unload", "refresh"):
            response = await client.post(f"{ADMIN}/{verb}", json={"adapter": "nosuch@latest"})
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found"), verb
        response = await client.post(f"{ADMIN}/rollback", json={"adapter": "nosuch@latest"})
        assert response.status_code == 400
        assert (await ask(client, "base:nosuch")).status_code == 404

    world.play(act)


def test_a_key_that_asks_too_much_is_told_when_to_come_again(world: World) -> None:
    """Three requests a minute a key; the owner is not counted, and one key's use is not another's."""
    keys = Keys({**KEYS.users, "other": hashlib.sha256(b"other key").hexdigest()}, KEYS.admin)

    async def act(client: httpx.AsyncClient) -> None:
        async def status(key: str) -> httpx.Response:
            client.headers["authorization"] = f"Bearer {key}"
            return await ask(client, "base")

        assert [(await status(USER_KEY)).status_code for _ in range(3)] == [200] * 3
        refused = await status(USER_KEY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert (await status("other key")).status_code == 200
        assert [(await status(ADMIN_KEY)).status_code for _ in range(5)] == [200] * 5

    world.play(act, keys, limits={"requests_per_min": 3})


def test_tokens_are_charged_when_the_answer_is_there_streamed_or_not(world: World) -> None:
    for stream in (False, True):

        async def act(client: httpx.AsyncClient, stream: bool = stream) -> None:
            body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            first = await client.post("/v1/chat/completions", json={**body, "stream": stream})
            assert first.status_code == 200
            second = await client.post("/v1/chat/completions", json=body)
            assert second.status_code == 429
            assert "tokens per minute" in second.json()["error"]["message"]

        world.play(act, limits={"tokens_per_min": 10})


def test_a_prompt_longer_than_the_endpoint_takes_is_refused(world: World) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        response = await ask(client, "base")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "max_prompt_tokens=5" in response.json()["error"]["message"]

    world.play(act, limits={"max_prompt_tokens": 5})


def test_more_answers_than_the_endpoint_gives_are_refused(world: World) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        body = {"model": "base", "prompt": "Hello", "max_tokens": 2, "temperature": 1.0, "n": 3}
        refused = await client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        given = await client.post("/v1/completions", json={**body, "n": 2})
        assert len(given.json()["choices"]) == 2

    world.play(act, limits={"max_n": 2})
