"""Which version a request gets, on a real engine and a real store: pinned, swapped, evicted, never mixed up."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import UnknownAdapter
from graftwork.artifacts.verify import WEIGHTS_FILE
from graftwork.errors import ArtifactError, StorageError
from graftwork.serving.adapter_cache import FETCH_THREADS, AdapterCache, Pin
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.models import AdapterSource
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import load_model, spec, write_lora
from tests.tiny import write_tiny_base

BASE = "b" * 64


@dataclass(frozen=True)
class CountingSource(AdapterSource):
    """Notes what is fetched."""

    fetched: list[str]

    def fetch(self, manifest: AdapterManifest) -> Path:
        self.fetched.append(manifest.version)
        return super().fetch(manifest)


@dataclass
class Stage:
    """An engine, a store with four published adapters, and what was fetched."""

    engine: NativeEngine
    store: Store
    folders: list[Path]
    fetched: list[str] = field(default_factory=list)

    def publish(self, task: str, number: int, alias: str | None = "latest") -> str:
        known = facts(base_digest=BASE, prompt={})
        return artifact.publish(self.store, task, self.folders[number], **known, alias=alias).version

    def residency(self, places: int, **settings: Any) -> AdapterCache:
        """Room for `places` of the adapters, which are all of one size."""
        held, asked = self.engine.check_adapter(self.folders[0]), (self.folders[0] / WEIGHTS_FILE).stat().st_size
        source = CountingSource(self.store, BASE, self.fetched)
        return AdapterCache(self.engine, source, max_bytes=places * held - held // 2 + asked, **settings)

    def loaded(self) -> set[str]:
        return {slot.version for slot in self.engine.adapters()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    tmp = tmp_path_factory.mktemp("residency")
    base = write_tiny_base(tmp / "base")
    return base, [write_lora(base, tmp / str(n), n, r=2, target_modules=["q_proj"]) for n in range(4)]


@pytest.fixture
def stage(parts: tuple[Path, list[Path]], tmp_path: Path) -> Iterator[Stage]:
    base, folders = parts
    engine = NativeEngine(load_model(base), spec(max_loaded=8), "cpu")
    yield Stage(engine, Store(str(tmp_path)), folders)
    engine.stop()


def run(stage: Stage, places: int, play: Callable[[AdapterCache], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def main() -> None:
        residency = stage.residency(places, **settings)
        try:
            async with asyncio.timeout(30):
                await play(residency)
        finally:
            residency.close()

    asyncio.run(main())


async def settle() -> None:
    """Let every task that can go on do so; loads in threads included."""
    for _ in range(200):
        await asyncio.sleep(0.001)


def test_many_who_ask_at_once_cause_one_load(stage: Stage) -> None:
    version = stage.publish("card", 0)

    async def play(residency: AdapterCache) -> None:
        pins = await asyncio.gather(*[residency.pin("card@latest") for _ in range(20)])
        assert {pin.manifest.version for pin in pins} == {version}
        assert stage.fetched == [version]
        assert residency.states()[0].running == 20
        assert all(pin.cold for pin in pins)
        assert not (await residency.pin("card@latest")).cold

    run(stage, 4, play)


def test_a_refresh_leaves_running_requests_on_their_version(stage: Stage) -> None:
    old = stage.publish("card", 0)

    async def play(residency: AdapterCache) -> None:
        before = await residency.pin("card@latest")
        new = stage.publish("card", 1)
        assert (await residency.pin("card@latest")).manifest.version == old  # published is not yet refreshed
        assert await residency.refresh("card@latest") == (old, new)
        assert (await residency.pin("card@latest")).manifest.version == new
        assert stage.loaded() == {old, new}
        assert {state.version: state.state for state in residency.states()} == {old: "draining", new: "ready"}
        residency.release(before)
        assert old in stage.loaded()  # one more request runs on it
        residency.release(Pin(before.manifest, before.held))
        assert stage.loaded() == {new}

    run(stage, 4, play)


def test_a_version_with_another_name_outlives_a_swap(stage: Stage) -> None:
    old = stage.publish("card", 0)
    artifact.promote(stage.store, "card", "stable", old)

    async def play(residency: AdapterCache) -> None:
        for ref in ("card@latest", "card@stable"):
            residency.release(await residency.pin(ref))
        new = stage.publish("card", 1)
        await residency.refresh("card@latest")
        assert stage.loaded() == {old, new}
        assert (await residency.pin("card@stable")).manifest.version == old

    run(stage, 4, play)


def test_the_least_recently_used_idle_version_goes(stage: Stage) -> None:
    versions = [stage.publish(task, number) for number, task in enumerate(("a", "b", "c"))]

    async def play(residency: AdapterCache) -> None:
        for ref in ("a@latest", "b@latest", "a@latest"):
            residency.release(await residency.pin(ref))
        await residency.pin("c@latest")
        assert stage.loaded() == {versions[0], versions[2]}

    run(stage, 2, play)


def test_a_version_in_constant_use_does_not_keep_others_out(stage: Stage) -> None:
    first, second = stage.publish("a", 0), stage.publish("b", 1)

    async def play(residency: AdapterCache) -> None:
        running = await residency.pin("a@latest")
        other = asyncio.create_task(residency.pin("b@latest"))
        await settle()
        late = asyncio.create_task(residency.pin("a@latest"))  # comes while `b` waits for the place
        await settle()
        assert not other.done()
        assert not late.done()
        assert stage.loaded() == {first}
        residency.release(running)
        pin = await other
        assert stage.loaded() == {second}
        residency.release(pin)
        assert (await late).manifest.version == first

    run(stage, 1, play, bypass=0)


def test_a_version_is_not_emptied_for_a_wait_that_ends_by_itself(stage: Stage) -> None:
    """Three requests pass the one that waits; the fourth does not."""
    first, second = stage.publish("a", 0), stage.publish("b", 1)

    async def play(residency: AdapterCache) -> None:
        pins = [await residency.pin("a@latest")]
        other = asyncio.create_task(residency.pin("b@latest"))
        await settle()
        pins += [await residency.pin("a@latest") for _ in range(3)]
        await settle()
        late = asyncio.create_task(residency.pin("a@latest"))
        await settle()
        assert (late.done(), other.done()) == (False, False)
        for pin in pins:
            assert pin.manifest.version == first
            residency.release(pin)
        residency.release(await other)
        assert (await other).manifest.version == second
        assert (await late).manifest.version == first

    run(stage, 1, play, bypass=3)


def test_a_pinned_version_stays_and_leaves_room_for_others(stage: Stage) -> None:
    versions = [stage.publish(task, number) for number, task in enumerate(("a", "b", "c"))]

    async def play(residency: AdapterCache) -> None:
        assert await residency.keep("a@latest") == versions[0]
        for ref in ("b@latest", "c@latest", "b@latest"):
            residency.release(await residency.pin(ref))
            assert versions[0] in stage.loaded()
        with pytest.raises(ArtifactError, match=r"b@latest(.|\n)*at most half"):
            await residency.keep("b@latest")
        assert [state.pinned for state in residency.states() if state.version == versions[0]] == [True]
        await residency.unkeep("a@latest")
        for ref in ("b@latest", "c@latest"):
            residency.release(await residency.pin(ref))
        assert stage.loaded() == {versions[1], versions[2]}

    run(stage, 2, play)


def test_unload_takes_a_version_out_with_its_last_request(stage: Stage) -> None:
    version = stage.publish("a", 0)

    async def play(residency: AdapterCache) -> None:
        running = await residency.pin("a@latest")
        assert await residency.unload("a@latest") == version
        assert [(state.state, state.running) for state in residency.states()] == [("draining", 1)]
        residency.release(running)
        assert stage.loaded() == set()
        assert (await residency.pin("a@latest")).manifest.version == version  # loads again when it is asked for

    run(stage, 2, play)


def test_an_adapter_larger_than_the_budget_is_refused(stage: Stage) -> None:
    stage.publish("a", 0)

    async def play(residency: AdapterCache) -> None:
        with pytest.raises(ArtifactError, match=r"host_cache_bytes"):
            await residency.pin("a@latest")

    run(stage, 0, play)


def test_a_store_that_stalls_harms_only_who_waits_for_it(stage: Stage) -> None:
    """The stalled calls hold every fetch thread; what is here, or asked for later, goes on."""
    stage.publish("here", 0)
    stage.publish("away1", 1)
    stalled, gate = threading.Semaphore(0), threading.Event()

    class Stalling(AdapterSource):
        def resolve(self, ref: str) -> AdapterManifest:
            if ref.startswith("away"):
                stalled.release()
                gate.wait()
            return super().resolve(ref)

    async def main() -> None:
        source = Stalling(stage.store, BASE)
        residency = AdapterCache(stage.engine, source, max_bytes=1 << 20, fetch_timeout_s=0.5)
        try:
            residency.release(await residency.pin("here@latest"))
            refs = [f"away{n}@latest" for n in range(FETCH_THREADS)]
            waiting = [asyncio.create_task(residency.pin(ref)) for ref in (*refs, *refs)]
            for _ in refs:
                await asyncio.to_thread(stalled.acquire)
            residency.release(await residency.pin("here@latest"))
            for failed in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(failed, StorageError)
                assert "fetch_timeout_s" in failed.problem
            gate.set()
            assert (await residency.pin("away1@latest")).manifest.task == "away1"
        finally:
            gate.set()
            residency.close()

    asyncio.run(main())


def test_a_refresh_gets_its_place_under_constant_use(stage: Stage) -> None:
    stage.publish("a", 0)

    async def play(residency: AdapterCache) -> None:
        running = await residency.pin("a@latest")
        new = stage.publish("a", 1)
        swap = asyncio.create_task(residency.refresh("a@latest"))
        await settle()
        assert not swap.done()
        residency.release(running)
        await swap
        assert (await residency.pin("a@latest")).manifest.version == new
        assert stage.loaded() == {new}

    run(stage, 1, play)


def test_a_caller_that_gives_up_does_not_take_the_load_from_others(stage: Stage) -> None:
    version = stage.publish("a", 0)

    async def play(residency: AdapterCache) -> None:
        impatient, patient = (asyncio.create_task(residency.pin("a@latest")) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).manifest.version == version
        assert residency.states()[0].running == 1

    run(stage, 4, play)


def test_a_broken_new_version_changes_nothing(stage: Stage) -> None:
    old = stage.publish("a", 0)

    async def play(residency: AdapterCache) -> None:
        residency.release(await residency.pin("a@latest"))
        new = stage.publish("a", 1)
        weights = Path(stage.store.path("adapters", "a", new, "adapter_model.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        with pytest.raises(ArtifactError, match="sha256 differs"):
            await residency.refresh("a@latest")
        assert (await residency.pin("a@latest")).manifest.version == old
        assert stage.publish("a", 1) == new  # written anew
        assert await residency.refresh("a@latest") == (old, new)

    run(stage, 4, play)


def test_a_broken_adapter_works_once_it_is_mended(stage: Stage) -> None:
    version = stage.publish("a", 0)
    weights = Path(stage.store.path("adapters", "a", version, "adapter_model.safetensors"))
    whole = weights.read_bytes()

    async def play(residency: AdapterCache) -> None:
        weights.write_bytes(whole[:-1] + b"?")
        failed = await asyncio.gather(*[residency.pin("a@latest") for _ in range(3)], return_exceptions=True)
        assert all(isinstance(error, ArtifactError) for error in failed)
        weights.write_bytes(whole)
        assert (await residency.pin("a@latest")).manifest.version == version

    run(stage, 1, play)


def test_unknown_and_foreign_adapters_are_refused(stage: Stage) -> None:
    known = facts(base_digest="f" * 64, prompt={})
    artifact.publish(stage.store, "foreign", stage.folders[0], **known, alias="latest")

    async def play(residency: AdapterCache) -> None:
        with pytest.raises(UnknownAdapter):
            await residency.pin("nosuch@latest")
        with pytest.raises(ArtifactError, match="trained on base"):
            await residency.pin("foreign@latest")
        assert stage.loaded() == set()

    run(stage, 1, play)
