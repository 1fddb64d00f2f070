"""LRU cache of adapter versions in host memory, and the version that a new request gets.

A reference (`task@alias`) names a manifest; a request pins the manifest's version at admission and keeps it to its end.
`refresh` reads the alias again, loads the version that it points at, and only then flips the reference, in one
assignment: no request waits, none changes its version, and the old version leaves the engine with its last request.

store -> this machine -> host memory (here, a byte budget) -> slot (the engine, when a request starts to run). A load
begins with the first request that needs it, in threads, and only those requests wait. Fetching a file and reading it
have threads of their own: a store that stalls delays no request whose adapter is here. All methods run on the replica's
event loop.
"""

import asyncio
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.verify import WEIGHTS_FILE
from graftwork.errors import ArtifactError, StorageError


@dataclass(slots=True, eq=False)
class CachedAdapter:
    """One version in the engine. `pins` are requests that hold it; draining takes no more of them."""

    version: str
    size_bytes: int
    pins: int = 0
    kept: bool = False
    """Never dropped to make room."""
    draining: bool = False
    last_used: float = field(default_factory=time.monotonic)


class ByteBudget:
    """Versions within `max_bytes`. `on_dropped` is called with each version that is dropped.

    Room goes to those that wait in the order in which they came. It is made by dropping the version that was used
    longest ago and that nobody holds. Where all are held, versions that are here go on taking requests until `bypass`
    of them have passed the one that waits; then those with the fewest requests take no more until they have gone:
    constant traffic keeps no version out for good, and none is emptied for a wait that would have ended by itself.
    """

    def __init__(self, max_bytes: int, bypass: int, on_dropped: Callable[[str], None]) -> None:
        self.max_bytes, self._bypass, self._on_dropped = max_bytes, bypass, on_dropped
        self.held: dict[str, CachedAdapter] = {}
        self.expected: Counter[str] = Counter()
        """Requests that wait for a version and pin it once it is loaded."""
        self._reserved_bytes = 0
        self._line: deque[str] = deque()  # versions that wait for room
        self._bypass_count = 0  # requests that went by since the first of the line waits
        self._changed = asyncio.Event()

    def get(self, version: str) -> CachedAdapter | None:
        """The version where it takes requests. One that drains takes them again when nobody waits for its room."""
        held = self.held.get(version)
        if held is None or (held.draining and self._line):
            return None
        held.draining = False
        return held

    def pin(self, held: CachedAdapter) -> None:
        """One request more."""
        held.pins += 1
        if self._line:
            self._bypass_count += 1
            if self._bypass_count >= self._bypass:
                self._changed.set()

    def unpin(self, held: CachedAdapter) -> None:
        """One request less; the last one of a draining version frees it."""
        held.pins -= 1
        held.last_used = time.monotonic()
        if held.pins == 0:
            if held.draining:
                self._drop(held)
            self._changed.set()

    def retire(self, held: CachedAdapter) -> None:
        """The version goes, now or with its last request."""
        held.draining, held.kept = True, False
        if held.pins == 0:
            self._drop(held)
            self._changed.set()

    def pinned_bytes(self, without: CachedAdapter) -> int:
        """Bytes of the other versions that are never dropped."""
        return sum(held.size_bytes for held in self.held.values() if held.kept and held is not without)

    async def reserve(self, version: str, size: int) -> bool:
        """Wait for `size` bytes. False: nothing is reserved, the version was draining and takes requests again."""
        self._line.append(version)
        try:
            while self._line[0] != version or (version not in self.held and not self._fits(size)):
                self._changed.clear()
                await self._changed.wait()
            if version in self.held:
                self.held[version].draining = False
                return False
            self._reserved_bytes += size
            return True
        finally:
            if self._line[0] == version:
                self._bypass_count = 0
            self._line.remove(version)
            self._changed.set()

    def insert(self, version: str, reserved: int, size: int | None) -> None:
        """The load that `reserve` made room for has ended; `size` None: it failed."""
        self._reserved_bytes -= reserved
        if size is not None:
            self.held[version] = CachedAdapter(version, size)
        self._changed.set()

    def notify(self) -> None:
        """Something that those who wait look at has changed."""
        self._changed.set()

    def _fits(self, size: int) -> bool:
        """Make room for the first of the line: drop what nobody holds, or have enough of the others drain."""
        while (
            lacking := self._reserved_bytes + sum(h.size_bytes for h in self.held.values()) + size - self.max_bytes
        ) > 0:
            unheld = [h for h in self.held.values() if not (h.pins or h.kept or self.expected[h.version])]
            if not unheld:
                self._drain(lacking)
                return False
            self._drop(min(unheld, key=lambda held: held.last_used))
        return True

    def _drain(self, lacking: int) -> None:
        if self._bypass_count < self._bypass:
            return
        busy = [held for held in self.held.values() if held.pins and not held.kept]
        for held in sorted(busy, key=lambda held: (not held.draining, held.pins, held.last_used)):
            if lacking > 0:
                held.draining = True
                lacking -= held.size_bytes

    def _drop(self, held: CachedAdapter) -> None:
        del self.held[held.version]
        self._on_dropped(held.version)


State = Literal["ready", "draining", "loading"]
ArgT = TypeVar("ArgT")
ResultT = TypeVar("ResultT")
FETCH_THREADS = 8
READ_THREADS = 2


class AdapterLoader(Protocol):
    """The part of the engine that holds adapters."""

    def load_adapter(self, version: str, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Blocks until the version can be used. Returns the bytes that it takes."""

    def retire_adapter(self, version: str) -> None:
        """The version takes no new request."""


class Source(Protocol):
    """Where adapters come from. All methods block and raise what the waiting requests then raise."""

    def resolve(self, ref: str) -> AdapterManifest:
        """Reference -> manifest, checked against the base."""

    def fetch(self, manifest: AdapterManifest) -> Path:
        """Its files in a folder on this machine."""

    def discard_damaged(self, manifest: AdapterManifest) -> None:
        """Forget what was fetched, if it isn't as published."""


@dataclass(frozen=True, slots=True)
class Residence:
    """One line of `AdapterCache.states`."""

    version: str
    state: State
    running: int
    refs: tuple[str, ...]
    """References that new requests follow to this version."""
    pinned: bool = False


@dataclass(slots=True, eq=False)
class Pin:
    """A request's hold on one version. Release it once."""

    manifest: AdapterManifest
    held: CachedAdapter
    cold: bool = False
    """It had to be loaded, or was being loaded, when the request came."""


class AdapterCache:
    """Loads on demand, one load a version however many wait for it, within `max_bytes` of memory: see `ByteBudget`."""

    def __init__(
        self, loader: AdapterLoader, source: Source, *, max_bytes: int, fetch_timeout_s: float = 60.0, bypass: int = 64
    ) -> None:
        self._loader, self._source, self._fetch_timeout_s = loader, source, fetch_timeout_s
        self._budget = ByteBudget(max_bytes, bypass, loader.retire_adapter)
        self._refs: dict[str, AdapterManifest] = {}
        self._resolving: dict[str, asyncio.Task[AdapterManifest]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._one_refresh: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._fetches = ThreadPoolExecutor(FETCH_THREADS, "adapter-fetch")
        self._reads = ThreadPoolExecutor(READ_THREADS, "adapter-read")

    async def pin(self, ref: str) -> Pin:
        """Hold the version that `ref` means now, loading it first where needed. Only this caller waits for that."""
        cold = False
        while True:
            manifest = self._refs.get(ref)  # read again after every wait: the reference may have moved on
            if manifest is None:
                found = await self._resolve_once(ref)
                self._refs.setdefault(ref, found)  # a refresh may have been quicker: its answer is newer
                continue
            held = self._budget.get(manifest.version)
            if held is not None:
                self._budget.pin(held)
                return Pin(manifest, held, cold)
            cold = True
            try:
                await self._load(manifest)
            finally:
                if manifest.version not in self._budget.held and self._refs.get(ref) is manifest:
                    del self._refs[ref]  # the load failed: the next request reads the alias again

    def release(self, pin: Pin) -> None:
        """The request has ended in the engine. The last one of a draining version frees it."""
        self._budget.unpin(pin.held)

    async def refresh(self, ref: str) -> tuple[str | None, str]:
        """Read the alias again and move new requests to the version it points at. Returns (old, new) versions.

        Requests admitted after it returned get the new version. Raises what `resolve` and the load raise; then
        everything stays as it was.
        """
        lock = self._one_refresh.setdefault(ref, asyncio.Lock())
        async with lock:
            manifest = await self._from_store(self._source.resolve, ref)
            old = self._refs.get(ref)
            if old is not None and old.version == manifest.version and manifest.version in self._budget.held:
                return old.version, manifest.version
            while (held := self._budget.get(manifest.version)) is None:
                await self._load(manifest)
            self._budget.pin(held)  # between load and flip nothing may push it out
            self._refs[ref] = manifest
            self._retire_unnamed(old)
            self.release(Pin(manifest, held))
            return (old.version if old else None), manifest.version

    async def keep(self, ref: str) -> str:
        """Load the version and never drop it to make room, until `unkeep`. Returns the version.

        Raises ArtifactError where the kept ones would take more than half of the budget: the others need a place.
        """
        pin = await self.pin(ref)
        try:
            kept, most = self._budget.pinned_bytes(without=pin.held), self._budget.max_bytes
            if kept + pin.held.size_bytes > most // 2:
                found = f"{kept} bytes are pinned already, this one takes {pin.held.size_bytes}"
                rule = f"pinned adapters take at most half of engine.host_cache_bytes={most}"
                raise ArtifactError(f"pin {ref}", found, rule, "unpin another one, or raise engine.host_cache_bytes")
            pin.held.kept = True
            return pin.manifest.version
        finally:
            self.release(pin)

    async def unkeep(self, ref: str) -> str:
        """End `keep`; the version stays until its room is needed. Returns it."""
        manifest = await self._manifest(ref)
        held = self._budget.held.get(manifest.version)
        if held is not None:
            held.kept = False
            self._budget.notify()
        return manifest.version

    async def unload(self, ref: str) -> str:
        """Take the version out of the engine, now or with its last request. The next request loads it again."""
        manifest = await self._manifest(ref)
        self._refs = {name: named for name, named in self._refs.items() if named.version != manifest.version}
        self._retire_unnamed(manifest)
        return manifest.version

    def resolved_refs(self) -> dict[str, str]:
        """The version that each reference means for new requests, of those that somebody has asked for."""
        return {ref: manifest.version for ref, manifest in self._refs.items()}

    def states(self) -> list[Residence]:
        """Every version in the engine or on its way there."""
        names: dict[str, list[str]] = {}
        for ref, manifest in sorted(self._refs.items()):
            names.setdefault(manifest.version, []).append(ref)
        held = [
            Residence(h.version, "draining" if h.draining else "ready", h.pins, tuple(names.get(h.version, ())), h.kept)
            for h in self._budget.held.values()
        ]
        waiting = [v for v in self._loading if v not in self._budget.held]
        return held + [Residence(version, "loading", 0, tuple(names.get(version, ()))) for version in waiting]

    def close(self) -> None:
        """Ends the loading threads."""
        for threads in (self._fetches, self._reads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _manifest(self, ref: str) -> AdapterManifest:
        known = self._refs.get(ref)
        return known if known is not None else await self._resolve_once(ref)

    async def _resolve_once(self, ref: str) -> AdapterManifest:
        """Resolve a reference, once however many requests wait: a stalled store takes one thread, not all."""
        task = self._resolving.get(ref)
        if task is None:
            task = asyncio.create_task(self._from_store(self._source.resolve, ref))
            self._resolving[ref] = task
            task.add_done_callback(lambda done: _consume_result(self._resolving, ref, done))
        return await asyncio.shield(task)

    async def _load(self, manifest: AdapterManifest) -> None:
        task = self._loading.get(manifest.version)
        if task is None:
            task = asyncio.create_task(self._load_now(manifest))
            self._loading[manifest.version] = task
            task.add_done_callback(lambda done: _consume_result(self._loading, manifest.version, done))
        self._budget.expected[manifest.version] += 1
        try:
            await asyncio.shield(task)  # a caller that gives up must not take the load from the others
        finally:
            self._budget.expected[manifest.version] -= 1
            self._budget.expected += Counter()  # drops what has fallen to zero
            self._budget.notify()

    async def _load_now(self, manifest: AdapterManifest) -> None:
        folder = await self._from_store(self._source.fetch, manifest)
        size = manifest.files[WEIGHTS_FILE].size_bytes
        if size > self._budget.max_bytes:
            rule = f"an adapter fits into engine.host_cache_bytes={self._budget.max_bytes}"
            raise ArtifactError(f"adapter {manifest.ref}", f"{size} bytes", rule, "raise engine.host_cache_bytes")
        if not await self._budget.reserve(manifest.version, size):
            return
        read = None
        try:
            digests = {name: entry.sha256 for name, entry in manifest.files.items()}
            loop, load = asyncio.get_running_loop(), self._loader.load_adapter
            read = await loop.run_in_executor(self._reads, load, manifest.version, folder, digests)
        except ArtifactError:
            await self._from_store(self._source.discard_damaged, manifest)
            raise
        finally:
            self._budget.insert(manifest.version, size, read)

    def _retire_unnamed(self, manifest: AdapterManifest | None) -> None:
        """After a flip: the old version goes, unless another reference still leads to it."""
        held = self._budget.held.get(manifest.version) if manifest is not None else None
        if held is None or any(named.version == held.version for named in self._refs.values()):
            return
        self._budget.retire(held)

    async def _from_store(self, call: Callable[[ArgT], ResultT], arg: ArgT) -> ResultT:
        """A call that may wait for the store, for so long. The thread itself ends with its sockets' time limits."""
        try:
            async with asyncio.timeout(self._fetch_timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._fetches, call, arg)
        except TimeoutError:
            found = f"no answer within engine.fetch_timeout_s={self._fetch_timeout_s:g}"
            raise StorageError("the adapter store", found, "", "check the store, then try again") from None


def _consume_result(tasks: dict[str, asyncio.Task[ResultT]], key: str, task: asyncio.Task[ResultT]) -> None:
    """A shared task has ended; its error is read, so that one nobody waits for any more doesn't warn."""
    del tasks[key]
    if not task.cancelled():
        task.exception()
