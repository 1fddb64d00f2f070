"""Which adapter versions are in the engine, and which one a new request gets. Lives on the replica's event loop.

A reference (`task@alias`) names a manifest; a request pins the manifest's version at admission and keeps it to its end.
`refresh` reads the alias again, loads the version it points at, and only then flips the reference, in one assignment:
no request waits, none changes its version, and the old version leaves the engine with its last request.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from graftwork.artifact import AdapterManifest

State = Literal["ready", "draining", "loading"]
ArgT = TypeVar("ArgT")
ResultT = TypeVar("ResultT")


class Slots(Protocol):
    """The part of the engine that holds adapters."""

    def load_adapter(self, version: str, folder: Path) -> None:
        """Blocks until the version can be used."""

    def retire_adapter(self, version: str) -> None:
        """The version takes no new request."""


@dataclass(slots=True, eq=False)
class Held:
    """One version in the engine. `pins` are requests that run on it; draining takes no more of them."""

    version: str
    pins: int = 0
    draining: bool = False
    last_used: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Residence:
    """One line of `Residency.states`."""

    version: str
    state: State
    running: int
    refs: tuple[str, ...]
    """References that new requests follow to this version."""


@dataclass(slots=True, eq=False)
class Pin:
    """A request's hold on one version. Release it once."""

    manifest: AdapterManifest
    held: Held


class Residency:
    """Loads on demand, one load a version however many wait for it; at most `max_loaded` versions at a time.

    resolve: reference -> manifest, checked against the base. fetch: manifest -> verified local folder. Both block, run
    in `loads` threads, and raise what the waiting requests then raise.
    """

    def __init__(
        self,
        slots: Slots,
        resolve: Callable[[str], AdapterManifest],
        fetch: Callable[[AdapterManifest], Path],
        *,
        max_loaded: int,
        loads: int = 4,
    ) -> None:
        self._slots, self._resolve, self._fetch, self._max_loaded = slots, resolve, fetch, max_loaded
        self._refs: dict[str, AdapterManifest] = {}
        self._held: dict[str, Held] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._expected: Counter[str] = Counter()  # who waits for a version and pins it once it is there
        self._reserved = self._waiting = 0
        self._changed = asyncio.Event()
        self._one_refresh: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._threads = ThreadPoolExecutor(loads, "adapter-load")

    async def pin(self, ref: str) -> Pin:
        """Hold the version that `ref` means now, loading it first where needed. Only this caller waits for that."""
        while True:
            manifest = self._refs.get(ref)  # read again after every wait: the reference may have moved on
            if manifest is None:
                found = await self._in_thread(self._resolve, ref)
                self._refs.setdefault(ref, found)  # a refresh may have been quicker: its answer is newer
                continue
            held = self._held.get(manifest.version)
            if held is not None and not held.draining:
                held.pins += 1
                return Pin(manifest, held)
            try:
                await self._load(manifest)
            finally:
                if manifest.version not in self._held and self._refs.get(ref) is manifest:
                    del self._refs[ref]  # the load failed: the next request reads the alias again

    def release(self, pin: Pin) -> None:
        """The request has ended in the engine. The last one of a draining version frees it."""
        held = pin.held
        held.pins -= 1
        held.last_used = time.monotonic()
        if held.pins == 0:
            if held.draining:
                self._drop(held)
            self._changed.set()

    async def refresh(self, ref: str) -> tuple[str | None, str]:
        """Read the alias again and move new requests to the version it points at. Returns (old, new) versions.

        Requests admitted after it returned get the new version. Raises what `resolve` and the load raise; then
        everything stays as it was.
        """
        async with self._one_refresh[ref]:
            manifest = await self._in_thread(self._resolve, ref)
            old = self._refs.get(ref)
            if old is not None and old.version == manifest.version and manifest.version in self._held:
                return old.version, manifest.version
            held = await self._ready(manifest)
            held.pins += 1  # between load and flip nothing may push it out
            self._refs[ref] = manifest
            self._retire_unnamed(old)
            self.release(Pin(manifest, held))
            return (old.version if old else None), manifest.version

    def states(self) -> list[Residence]:
        """Every version in the engine or on its way there."""
        names: defaultdict[str, list[str]] = defaultdict(list)
        for ref, manifest in self._refs.items():
            names[manifest.version].append(ref)
        held = [
            Residence(h.version, "draining" if h.draining else "ready", h.pins, tuple(sorted(names[h.version])))
            for h in self._held.values()
        ]
        waiting = [v for v in self._loading if v not in self._held]
        return held + [Residence(version, "loading", 0, tuple(sorted(names[version]))) for version in waiting]

    def close(self) -> None:
        """Ends the loading threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ready(self, manifest: AdapterManifest) -> Held:
        while True:
            held = self._held.get(manifest.version)
            if held is not None and not held.draining:
                return held
            await self._load(manifest)

    async def _load(self, manifest: AdapterManifest) -> None:
        task = self._loading.get(manifest.version)
        if task is None:
            task = asyncio.create_task(self._load_now(manifest))
            self._loading[manifest.version] = task
            task.add_done_callback(lambda done: self._loaded(manifest.version, done))
        self._expected[manifest.version] += 1
        try:
            await asyncio.shield(task)  # a caller that gives up must not take the load from the others
        finally:
            self._expected[manifest.version] -= 1
            self._expected += Counter()  # drops what has fallen to zero
            self._changed.set()

    def _loaded(self, version: str, task: asyncio.Task[None]) -> None:
        del self._loading[version]
        if not task.cancelled():
            task.exception()  # seen here, so that a load nobody waits for any more doesn't warn

    async def _load_now(self, manifest: AdapterManifest) -> None:
        folder = await self._in_thread(self._fetch, manifest)
        await self._make_room(manifest.version)
        try:
            await self._in_thread(lambda place: self._slots.load_adapter(manifest.version, place), folder)
            self._held[manifest.version] = Held(manifest.version)
        finally:
            self._reserved -= 1
            self._changed.set()

    async def _make_room(self, version: str) -> None:
        """Wait for a free place and reserve it: the least recently used idle version goes.

        Where all are busy, the one used longest ago stops taking requests and goes when it is idle, so that a version
        under constant traffic can't keep others out for ever.
        """
        self._waiting += 1
        try:
            while version in self._held or len(self._held) + self._reserved >= self._max_loaded:
                if version in self._held or not self._drop_one():
                    self._changed.clear()
                    await self._changed.wait()
            self._reserved += 1
        finally:
            self._waiting -= 1

    def _drop_one(self) -> bool:
        """Drop an idle version now (True), or make sure that enough busy ones drain for all that wait (False)."""
        by_age = sorted(self._held.values(), key=lambda held: held.last_used)
        idle = next((held for held in by_age if held.pins == 0 and not self._expected[held.version]), None)
        if idle is not None:
            self._drop(idle)
            return True
        draining = sum(held.draining for held in by_age)
        busy = [held for held in by_age if held.pins and not held.draining]
        for held in busy[: max(self._waiting - draining, 0)]:
            held.draining = True
        return False

    def _retire_unnamed(self, manifest: AdapterManifest | None) -> None:
        """After a flip: the old version goes, unless another reference still leads to it."""
        held = self._held.get(manifest.version) if manifest is not None else None
        if held is None or any(named.version == held.version for named in self._refs.values()):
            return
        held.draining = True
        if held.pins == 0:
            self._drop(held)
            self._changed.set()

    def _drop(self, held: Held) -> None:
        del self._held[held.version]
        self._slots.retire_adapter(held.version)

    async def _in_thread(self, call: Callable[[ArgT], ResultT], arg: ArgT) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, arg)
