"""Slots: the adapter versions that can be computed with now. The engine's thread alone uses them.

A slot is taken when a request starts to run, not while it is queued, so as many slots as rows (`max_loaded` >=
`max_batch`) are enough for any mix of adapters. On the CPU a slot is the host copy and a place in the tables that
decoding reads (see `tables`); on another device it is a copy there.
"""

from collections.abc import Callable

from graftwork.serving.engine.slots import LoadedAdapter


class AdapterSlots:
    """At most `max_loaded` versions; the least recently used one without a running request makes room.

    bring: a held version on the engine's device. on_left: told each version that has lost its slot; its host copy and
    its cached prefixes stay.
    """

    def __init__(self, max_loaded: int, bring: Callable[[str], LoadedAdapter], on_left: Callable[[str], None]) -> None:
        self._max_loaded, self._bring, self._on_left = max_loaded, bring, on_left
        self._slots: dict[str, LoadedAdapter] = {}  # least recently used first
        self._rows: dict[str, int] = {}

    def can_acquire(self, version: str) -> bool:
        """Whether a request of this version can start: it has a slot, or one is empty or idle."""
        return version in self._slots or len(self._slots) < self._max_loaded or self._idle() is not None

    def acquire(self, version: str) -> LoadedAdapter:
        """Takes the version's slot for one more running request; `can_acquire` was checked before."""
        adapter = self._slots.pop(version, None)
        if adapter is None:
            self._make_room()
            adapter = self._bring(version)
        self._slots[version] = adapter
        self._rows[version] = self._rows.get(version, 0) + 1
        return adapter

    def release(self, version: str) -> None:
        """One running request less. The slot stays filled until another version needs it."""
        self._rows[version] -= 1

    def empty(self, version: str) -> None:
        """Gives the slot back at once; the version has no running request."""
        if self._slots.pop(version, None) is not None:
            rows = self._rows.pop(version)
            assert rows == 0, f"{version} has {rows} running requests"
            self._on_left(version)

    def by_load(self) -> list[str]:
        """Busy versions, those with the fewest running requests first."""
        busy = [version for version in self._slots if self._rows[version]]
        return sorted(busy, key=lambda version: self._rows[version])

    def versions(self) -> frozenset[str]:
        """Versions that have a slot. Any thread may ask."""
        return frozenset(self._slots.copy())

    def _idle(self) -> str | None:
        return next((v for v in self._slots if not self._rows[v]), None)

    def _make_room(self) -> None:
        if len(self._slots) >= self._max_loaded:
            idle = self._idle()
            assert idle is not None, "acquired without `can_acquire`"
            self.empty(idle)
