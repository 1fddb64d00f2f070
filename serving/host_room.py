"""The byte budget of adapters in host memory: who waits for room, and who goes. Lives on the replica's event loop."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field


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
    """Versions within `max_bytes`. `on_dropped` is told each one that goes.

    Room goes to those that wait in the order in which they came. It is made by dropping the version that was used
    longest ago and that nobody holds. Where all are held, versions that are here go on taking requests until `bypass`
    of them have passed the one that waits; then those with the fewest requests take no more until they have gone:
    constant traffic keeps no version out for good, and none is emptied for a wait that would have ended by itself.
    """

    def __init__(self, max_bytes: int, bypass: int, on_dropped: Callable[[str], None]) -> None:
        self.max_bytes, self._bypass, self._on_dropped = max_bytes, bypass, on_dropped
        self.held: dict[str, CachedAdapter] = {}
        self.expected: Counter[str] = Counter()
        """Who waits for a version and pins it once it is there."""
        self._reserved = 0
        self._line: deque[str] = deque()  # versions that wait for room
        self._passed = 0  # requests that went by since the first of the line waits
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
            self._passed += 1
            if self._passed >= self._bypass:
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

    def kept_bytes(self, without: CachedAdapter) -> int:
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
            self._reserved += size
            return True
        finally:
            if self._line[0] == version:
                self._passed = 0
            self._line.remove(version)
            self._changed.set()

    def insert(self, version: str, reserved: int, size: int | None) -> None:
        """The load that `reserve` made room for has ended; `size` None: it failed."""
        self._reserved -= reserved
        if size is not None:
            self.held[version] = CachedAdapter(version, size)
        self._changed.set()

    def notify(self) -> None:
        """Something that those who wait look at has changed."""
        self._changed.set()

    def _fits(self, size: int) -> bool:
        """Make room for the first of the line: drop what nobody holds, or have enough of the others drain."""
        while (lacking := self._reserved + sum(h.size_bytes for h in self.held.values()) + size - self.max_bytes) > 0:
            unheld = [h for h in self.held.values() if not (h.pins or h.kept or self.expected[h.version])]
            if not unheld:
                self._drain(lacking)
                return False
            self._drop(min(unheld, key=lambda held: held.last_used))
        return True

    def _drain(self, lacking: int) -> None:
        if self._passed < self._bypass:
            return
        busy = [held for held in self.held.values() if held.pins and not held.kept]
        for held in sorted(busy, key=lambda held: (not held.draining, held.pins, held.last_used)):
            if lacking > 0:
                held.draining = True
                lacking -= held.size_bytes

    def _drop(self, held: CachedAdapter) -> None:
        del self.held[held.version]
        self._on_dropped(held.version)
