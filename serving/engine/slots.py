"""The slot pool: loaded adapter versions, who holds them, and when their memory goes back.

Any thread may call it; one lock guards it. Weights of a slot never change: an update is another version.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from graftwork.errors import ArtifactError, RunError
from graftwork.serving.engine.adapter_file import LinearShape, SiteWeights, read_adapter
from graftwork.serving.engine.sites import Site
from graftwork.serving.engine.types import SlotState


@dataclass(frozen=True)
class GroupWeights:
    """The adapter of linears with a common input. a_RI stacks the members' lora_A: [sum of ranks, in]."""

    a_RI: torch.Tensor
    members: tuple[SiteWeights | None, ...]
    """By member number; each member's a_RI is a view of the stack. None: not adapted."""
    starts: tuple[int, ...]
    """First line of each member in a_RI."""


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One adapter version on the engine's device."""

    version: str
    rank: int
    groups: Mapping[str, GroupWeights]
    size_bytes: int


class _Slot:
    def __init__(self, weights: AdapterWeights) -> None:
        self.weights = weights
        self.holders = 0
        self.retired = False


class SlotPool:
    """Holds at most `max_loaded` versions; beyond it the least recently used idle one is dropped.

    on_freed: told each version whose memory went back (any thread, outside the lock).
    """

    def __init__(
        self,
        sites: Mapping[str, list[Site]],
        *,
        max_loaded: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        on_freed: Callable[[str], None],
    ) -> None:
        self._groups = sites
        self._linears = {site.name: site.shape for group in sites.values() for site in group}
        self._max_loaded, self._max_rank, self._dtype, self._device = max_loaded, max_rank, dtype, device
        self._on_freed = on_freed
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}  # least recently used first

    def load(self, version: str, folder: Path) -> None:
        """Reads the adapter into a slot; a version that is loaded already is left as it is (and un-retired).

        Raises ArtifactError (see `read_adapter`) or RunError when every slot is in use.
        """
        with self._lock:
            if version in self._slots:
                self._slots[version].retired = False
                return
        linears: Mapping[str, LinearShape] = self._linears
        weights = self._pack(version, read_adapter(folder, linears, max_rank=self._max_rank, dtype=self._dtype))
        with self._lock:
            if version in self._slots:  # another thread read it meanwhile, and may have holders already
                self._slots[version].retired = False
                return
            dropped = self._make_room()
            self._slots[version] = _Slot(weights)
        if dropped is not None:
            self._on_freed(dropped)

    def retire(self, version: str) -> None:
        """No new holder; freed when the last one lets go. Raises ArtifactError for a version that is not loaded."""
        with self._lock:
            slot = self._find(version)
            slot.retired = True
            freed = self._drop_if_done(version, slot)
        if freed:
            self._on_freed(version)

    def acquire(self, version: str) -> AdapterWeights:
        """Holds the version for one request. Raises ArtifactError where it is not loaded or retired."""
        with self._lock:
            slot = self._find(version)
            if slot.retired:
                raise ArtifactError(f"adapter {version}", "retired", "a retired version takes no new requests")
            slot.holders += 1
            self._slots[version] = self._slots.pop(version)
            return slot.weights

    def release(self, version: str) -> None:
        """Lets go of what `acquire` took."""
        with self._lock:
            slot = self._slots[version]
            slot.holders -= 1
            freed = self._drop_if_done(version, slot)
        if freed:
            self._on_freed(version)

    def states(self) -> list[SlotState]:
        """Loaded versions, least recently used first."""
        with self._lock:
            return [
                SlotState(version, slot.weights.rank, slot.weights.size_bytes, slot.holders, slot.retired)
                for version, slot in self._slots.items()
            ]

    def _find(self, version: str) -> _Slot:
        if version not in self._slots:
            rule = "a request names a loaded version"
            raise ArtifactError(f"adapter {version}", "not loaded", rule, "load it first; idle ones are dropped")
        return self._slots[version]

    def _make_room(self) -> str | None:
        if len(self._slots) < self._max_loaded:
            return None
        idle = next((version for version, slot in self._slots.items() if slot.holders == 0), None)
        if idle is None:
            rule = f"engine.max_loaded={self._max_loaded} adapters at most"
            raise RunError("load an adapter", "every slot has running requests", rule, "raise engine.max_loaded")
        del self._slots[idle]
        return idle

    def _drop_if_done(self, version: str, slot: _Slot) -> bool:
        if slot.retired and slot.holders == 0:
            del self._slots[version]
            return True
        return False

    def _pack(self, version: str, weights: Mapping[str, SiteWeights]) -> AdapterWeights:
        """Stacks the lora_A of each group, so that one matmul shrinks for all its members."""
        groups, size_bytes = {}, 0
        for name, sites in self._groups.items():
            members = [weights.get(site.name) for site in sites]
            if any(member is not None for member in members):
                groups[name] = self._stack(members)
                size_bytes += sum(_size_bytes(member) for member in members if member is not None)
        return AdapterWeights(version, max(site.rank for site in weights.values()), groups, size_bytes)

    def _stack(self, members: list[SiteWeights | None]) -> GroupWeights:
        stack = torch.cat([member.a_RI for member in members if member is not None]).to(self._device)
        placed: list[SiteWeights | None] = []
        starts, start = [], 0
        for member in members:
            starts.append(start)
            if member is None:
                placed.append(None)
                continue
            stop = start + member.rank
            placed.append(SiteWeights(stack[start:stop], member.b_OR.to(self._device).contiguous(), member.scaling))
            start = stop
        return GroupWeights(stack, tuple(placed), tuple(starts))


def _size_bytes(weights: SiteWeights) -> int:
    return weights.a_RI.nbytes + weights.b_OR.nbytes
