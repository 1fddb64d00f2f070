"""Who waits how long, in virtual time: the real scheduler, slots and host room under made-up traffic, without a model.

A step costs what it would: a fixed part, and a part for each token. A load costs time and, like a step, moves no clock
but this one's, so every run gives the same figures.
"""

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from graftwork.metrics import quantile
from graftwork.serving.adapter_cache import ByteBudget, CachedAdapter
from graftwork.serving.engine.adapter_slots import AdapterSlots
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.kv_cache import KvShape, KvStore
from graftwork.serving.engine.request import GenerateRequest, SamplingParams
from graftwork.serving.engine.scheduler import RunningRequest, Scheduler

STEP_MS, TOKEN_MS, LOAD_MS = 10.0, 0.5, 25.0
PROMPT = 32
ROWS = 16


@dataclass(frozen=True)
class Call:
    """One request that will be made."""

    version: str | None
    answer: int


@dataclass
class World:
    """`slots` slots, host memory for `places` adapters, and a clock."""

    slots: int
    places: int
    bypass: int = 64
    now_ms: float = 0.0
    left: list[str] = field(default_factory=list)
    """Versions that lost their slot."""
    ttft_ms: dict[str | None, list[float]] = field(default_factory=lambda: defaultdict(list))
    order: list[str | None] = field(default_factory=list)
    """Versions by first token."""
    most_rows: dict[str | None, int] = field(default_factory=lambda: defaultdict(int))

    loads: int = 0

    def __post_init__(self) -> None:
        kv = KvStore([KvShape(1, 1)], 65_536, 128, torch.float32, torch.device("cpu"))
        self.room = ByteBudget(self.places, self.bypass, lambda version: self.seats.empty(version))
        self.seats = AdapterSlots(self.slots, weights, self.left.append)
        self.scheduler = Scheduler(kv, None, self.seats, max_batch=ROWS, prefill_tokens=512)
        self._timers: list[tuple[float, asyncio.Event]] = []
        self._loading: dict[str, asyncio.Event] = {}
        self._count = 0

    async def after(self, ms: float) -> None:
        event = asyncio.Event()
        self._timers.append((self.now_ms + ms, event))
        await event.wait()

    async def ask(self, call: Call) -> None:
        """One request from its arrival to its end."""
        arrived = self.now_ms
        held = await self._hold(call.version) if call.version is not None else None
        self._count += 1
        done = asyncio.Event()
        request = GenerateRequest(str(self._count), (5,) * PROMPT, SamplingParams(call.answer), adapter=call.version)
        adapter = weights(call.version) if call.version is not None else None
        self.scheduler.add(RunningRequest((False, arrived, self._count), request, lambda _: done.set(), adapter))
        await done.wait()
        if held is not None:
            self.room.unpin(held)

    async def _hold(self, version: str) -> CachedAdapter:
        while (held := self.room.get(version)) is None:
            if version not in self._loading:
                self._loading[version] = asyncio.Event()
                if await self.room.reserve(version, 1):
                    await self.after(LOAD_MS)
                    self.room.insert(version, 1, 1)
                    self.loads += 1
                self._loading.pop(version).set()
            else:
                await self._loading[version].wait()
        self.room.pin(held)
        return held

    async def step(self) -> None:
        """One engine step, or, where there is nothing to compute, the time up to the next load's end."""
        await settle()
        decoding, prompts = self.scheduler.schedule()
        work = [*decoding, *prompts]
        tokens = sum(request.scheduled for request in work)
        if tokens:
            self.now_ms += STEP_MS + TOKEN_MS * tokens
        elif self._timers:
            self.now_ms = min(when for when, _ in self._timers)
        rows: dict[str | None, int] = defaultdict(int)
        for request in work:
            rows[request.version] += 1
            self._advance(request)
        for version, count in rows.items():
            self.most_rows[version] = max(self.most_rows[version], count)
        for timer in [timer for timer in self._timers if timer[0] <= self.now_ms]:
            self._timers.remove(timer)
            timer[1].set()

    def _advance(self, request: RunningRequest) -> None:
        assert request.row is not None
        finishes = request.scheduled == request.remaining
        request.row.length += request.scheduled
        if not finishes:
            return
        if len(request.tokens) == request.prompt_end:
            self.ttft_ms[request.version].append(self.now_ms - request.arrival[1])
            self.order.append(request.version)
        request.tokens.append(7)
        if len(request.tokens) - request.prompt_end == request.request.sampling.max_new_tokens:
            self.scheduler.remove(request)
            request.on_event(None)  # type: ignore[arg-type]  # only says that it ended


def weights(version: str) -> LoadedAdapter:
    return LoadedAdapter(version, rank=8, groups={})


async def settle() -> None:
    """Let every task go on that can."""
    for _ in range(6):
        await asyncio.sleep(0)


def zipf(adapters: int, seed: int) -> Iterator[Call]:
    """Adapters drawn by Zipf's law with exponent 1; answers of 4 to 28 tokens."""
    rng = random.Random(seed)
    shares = [1 / rank for rank in range(1, adapters + 1)]
    while True:
        yield Call(f"v{rng.choices(range(adapters), shares)[0]}", rng.randint(4, 28))


async def closed_loop(world: World, calls: Iterator[Call], callers: int, requests: int) -> None:
    """`callers` callers, each asking again as soon as it has its answer."""

    async def caller() -> None:
        while len(world.order) < requests:
            await world.ask(next(calls))

    tasks = [asyncio.create_task(caller()) for _ in range(callers)]
    while not all(task.done() for task in tasks):
        await world.step()


def worst_to_median(world: World) -> float:
    """The worst adapter's p95 over the median of all requests."""
    every = [ms for all_ms in world.ttft_ms.values() for ms in all_ms]
    return max(quantile(all_ms, 0.95) for all_ms in world.ttft_ms.values()) / quantile(every, 0.5)


@pytest.mark.parametrize(("slots", "places"), [(16, 64), (16, 24), (8, 16), (4, 64)])
def test_no_adapter_waits_three_times_the_median(slots: int, places: int) -> None:
    """1,000 adapters by Zipf's law, four callers a row: slots for every row or for a quarter of them."""
    world = World(slots, places)
    asyncio.run(closed_loop(world, zipf(1000, 1), callers=4 * ROWS, requests=1500))
    assert len(world.ttft_ms) > 400
    assert worst_to_median(world) < 2


def test_constant_traffic_keeps_no_version_out() -> None:
    """Two busy adapters, two slots, more callers than rows: a third waits its turn, a batch, and one slot to empty."""
    world = World(slots=2, places=8)
    began = queued = 0

    async def play() -> None:
        nonlocal began, queued
        calls = (Call(f"hot{n % 2}", 4 + n % 17) for n in itertools.count())
        hot = asyncio.create_task(closed_loop(world, calls, callers=2 * ROWS, requests=300))
        while len(world.order) < 100:
            await asyncio.sleep(0)
        began, queued = len(world.order), len(world.scheduler.waiting)
        cold = asyncio.create_task(world.ask(Call("cold", 4)))
        await hot
        cold.cancel()

    asyncio.run(play())
    assert "cold" in world.order
    assert world.order.index("cold") - began <= queued + 3 * ROWS
    assert len(world.left) == 2, "one adapter lost its slot, and got it back"


def test_a_busy_adapter_is_not_emptied_for_a_wait_that_ends_by_itself() -> None:
    """One adapter under constant traffic, single requests of others one after another through the second slot."""
    world = World(slots=2, places=8)

    async def play() -> None:
        calls = itertools.repeat(Call("hot", 12))
        hot = asyncio.create_task(closed_loop(world, calls, callers=4, requests=200))
        for n in range(20):
            await world.ask(Call(f"cold{n}", 4))
        await hot

    asyncio.run(play())
    assert "hot" not in world.left
    assert len(world.left) >= 18


def test_a_flood_takes_half_the_rows_while_others_wait_and_all_when_none_do() -> None:
    world = World(slots=16, places=64)

    async def play() -> None:
        flood = [asyncio.create_task(world.ask(Call("flood", 20))) for _ in range(10 * ROWS)]
        while world.most_rows["flood"] < ROWS:
            await world.step()
        calls = (Call(f"v{n % 40}", 20) for n in range(10_000))
        await closed_loop(world, calls, callers=2 * ROWS, requests=200)
        while not all(task.done() for task in flood):
            await world.step()

    asyncio.run(play())
    others = [ms for version, all_ms in world.ttft_ms.items() if version != "flood" for ms in all_ms]
    assert quantile(others, 0.5) < quantile(world.ttft_ms["flood"], 0.5) / 2
