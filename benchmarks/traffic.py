"""Requests on a replica's real path, without HTTP: pinned by AdapterCache, decoded in the engine, events to a loop."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from graftwork.serving.adapter_cache import AdapterCache
from graftwork.serving.detokenize import generate
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import GenerateRequest, SamplingParams
from graftwork.serving.models import AdapterSource
from graftwork.storage.store import Store

PROMPT, NEW = 64, 32
"""Tokens of each prompt, all different from the first token on, and of each answer."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Asked:
    """One answered request. Seconds: what its first token took, and all of it; the load of its adapter included."""

    ref: str | None
    ttft_s: float
    total_s: float


@asynccontextmanager
async def serving(engine: NativeEngine, store: Store, digest: str) -> AsyncIterator[AdapterCache]:
    """The engine at work, with the adapters that the store has for this base, for the time of the block."""
    residency = AdapterCache(engine, AdapterSource(store, digest), max_bytes=engine.spec.host_cache_bytes)
    engine.start()
    try:
        yield residency
    finally:
        await asyncio.to_thread(engine.stop)
        residency.close()


async def ask(
    engine: NativeEngine, residency: AdapterCache, ref: str | None, new: int = NEW, prompt: int = PROMPT
) -> Asked:
    """One greedy request of `new` tokens, of `ref` (`task@alias`) or of the base. Fails where the engine does."""
    number, began = next(_numbers), time.perf_counter()
    pin = await residency.pin(ref) if ref else None
    ids = tuple((7 + number * 31 + place * 17) % 40_000 for place in range(prompt))
    version = pin.manifest.version if pin else None
    request = GenerateRequest(f"r{number}", ids, SamplingParams(new), adapter=version, arrived=began)
    bursts = generate(engine, [request], on_end=lambda: residency.release(pin) if pin else None)
    await anext(bursts)  # it is queued
    first: float | None = None
    async for by_answer in bursts:
        first = first or time.perf_counter()
        assert by_answer[0][-1].error is None, by_answer[0][-1].error
    assert first is not None, "a request that ends has had an event"
    return Asked(ref, first - began, time.perf_counter() - began)


async def closed_loop(
    engine: NativeEngine, residency: AdapterCache, refs: Sequence[str | None], concurrency: int
) -> list[Asked]:
    """Asks all of `refs` in order, `concurrency` at a time."""
    queue: Iterator[str | None] = iter(refs)
    answered: list[Asked] = []

    async def worker() -> None:
        for ref in queue:
            answered.append(await ask(engine, residency, ref))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return answered


def zipf(tasks: Sequence[str], count: int, seed: int) -> list[str | None]:
    """`count` references, task n with a probability proportional to 1 / n."""
    weights = 1 / np.arange(1, len(tasks) + 1)
    drawn = np.random.default_rng(seed).choice(len(tasks), size=count, p=weights / weights.sum())
    return [f"{tasks[n]}@latest" for n in drawn]
