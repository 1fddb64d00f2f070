"""Adapter versions in memory: the pool in host memory, and the slots of the versions that are computed now.

The pool packs each version in one buffer of host memory and frees it when its last request ends; any thread may call
it. `AdapterSlots` copies a version to its slot on the engine's device. Weights never change: an update is a new
version.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import AdapterWeights, ReadOptions, SiteWeights
from graftwork.serving.engine.adapters.kinds import read_adapter
from graftwork.serving.engine.adapters.loaded import (
    GroupWeights,
    LoadedAdapter,
    common_buffer,
    copy_to_device,
    flatten,
    tensors_of,
)
from graftwork.serving.engine.adapters.weights_file import all_finite
from graftwork.serving.engine.lora_layers import LoraLayer
from graftwork.serving.engine.request import SlotState


class _PooledAdapter:
    def __init__(self, weights: LoadedAdapter, buffer: torch.Tensor) -> None:
        self.weights, self.buffer = weights, buffer
        self.holders = 0
        self.retired = False


class AdapterPool:
    """Versions in host memory. Who loads decides what goes: nothing is dropped before it is retired.

    device: where the adapters will be computed with; for a GPU the memory is page-locked. stacked: each group's lora_A
    are needed in one; otherwise plain LoRA stays as its file was read, not copied again.
    on_freed: called with each version whose memory went back (any thread, outside the lock).
    """

    def __init__(
        self,
        sites: Mapping[str, list[LoraLayer]],
        base: BaseView,
        options: ReadOptions,
        *,
        device: torch.device,
        stacked: bool,
        on_freed: Callable[[str], None],
    ) -> None:
        self._groups, self._base, self._stacked, self._options = sites, base, stacked, options
        self._pin = device.type == "cuda"
        self._on_freed = on_freed
        self._lock = threading.Lock()
        self._slots: dict[str, _PooledAdapter] = {}  # least recently used first

    def load(self, version: str, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads the adapter into host memory, and returns the bytes that it takes there.

        A version that is loaded already is left as it is (and un-retired). Raises ArtifactError (see `read_adapter`).
        """
        with self._lock:
            if version in self._slots:
                self._slots[version].retired = False
                return self._slots[version].buffer.nbytes
        slot = self._read(version, folder, digests)
        with self._lock:  # another thread may have read it meanwhile, and have holders already
            kept = self._slots.setdefault(version, slot)
            kept.retired = False
        return kept.buffer.nbytes

    def check(self, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads an adapter as `load` does, and lets it go again; the bytes that it would take."""
        return self._read("", folder, digests).buffer.nbytes

    def retire(self, version: str) -> None:
        """No new holder; freed when the last one lets go. Raises ArtifactError for a version that is not loaded."""
        with self._lock:
            self._find(version).retired = True
        self._free_if_done(version)

    def acquire(self, version: str) -> LoadedAdapter:
        """Holds the version for one request. Raises ArtifactError where it is not loaded or retired."""
        with self._lock:
            slot = self._find(version)
            if slot.retired:
                raise ArtifactError(f"adapter {version}", "retired", "a retired version takes no new requests")
            slot.holders += 1
            self._slots[version] = self._slots.pop(version)
            return slot.weights

    def virtual_tokens(self, version: str) -> int:
        """Places that the version takes before a prompt. Raises ArtifactError where it is not loaded."""
        with self._lock:
            lead = self._find(version).weights.virtual_tokens
        return lead.count if lead is not None else 0

    def release(self, version: str) -> None:
        """Lets go of what `acquire` took."""
        with self._lock:
            self._slots[version].holders -= 1
        self._free_if_done(version)

    def _free_if_done(self, version: str) -> None:
        with self._lock:
            slot = self._slots.get(version)
            if slot is None or not slot.retired or slot.holders:
                return
            del self._slots[version]
        self._on_freed(version)

    def copy_to_device(self, version: str, device: torch.device) -> LoadedAdapter:
        """An acquired version on a device; on the CPU the host copy itself."""
        with self._lock:
            slot = self._find(version)
        return copy_to_device(slot.weights, slot.buffer, device)

    def states(self, seated: Collection[str] = ()) -> list[SlotState]:
        """Loaded versions, least recently used first. `seated`: those that have a slot."""
        with self._lock:
            return [
                SlotState(version, slot.weights.rank, slot.buffer.nbytes, slot.holders, slot.retired, version in seated)
                for version, slot in self._slots.items()
            ]

    def _find(self, version: str) -> _PooledAdapter:
        if version not in self._slots:
            rule = "a request names a loaded version"
            raise ArtifactError(f"adapter {version}", "not loaded", rule, "load it first; idle ones are dropped")
        return self._slots[version]

    def _read(self, version: str, folder: Path, digests: Mapping[str, str] | None) -> _PooledAdapter:
        read = read_adapter(folder, self._base, self._options, digests)
        weights = self._pack(version, read)
        members = [member for group in weights.groups.values() for member in group.members if member is not None]
        halves = [half for member in members for half in (member.a_RI, member.b_OR)]
        buffer = None if self._pin or not weights.only_lora else common_buffer(halves)
        if buffer is None:
            weights, buffer = flatten(weights, pin=self._pin)
        if self._options.dtype == torch.float16 and not all(map(all_finite, tensors_of(weights))):
            rule = "adapter weights are finite in the engine's dtype (float16 ends at 65504)"
            raise ArtifactError(str(folder), "inf or nan after the cast to float16", rule, "serve it on a bf16 engine")
        return _PooledAdapter(weights, buffer)

    def _pack(self, version: str, read: AdapterWeights) -> LoadedAdapter:
        """By group of linears; DoRA's lora_A is the group's own, so that it is in memory once."""
        groups, scales = {}, dict(read.scales)
        for name, sites in self._groups.items():
            members = [read.linears.get(site.name) for site in sites]
            if any(member is not None for member in members):
                groups[name] = _group(members, stacked=self._stacked)
                for site, member in zip(sites, groups[name].members, strict=True):
                    dora = scales[site.name].dora if site.name in scales else None
                    if dora and member:
                        scales[site.name] = replace(scales[site.name], dora=replace(dora, a_RI=member.a_RI))
        rest = (read.bottlenecks, read.experts, read.routers, read.inputs, read.outputs, read.virtual_tokens)
        return LoadedAdapter(version, read.rank, groups, scales, *rest)


def _group(members: list[SiteWeights | None], *, stacked: bool) -> GroupWeights:
    starts = tuple(accumulate((member.rank if member else 0 for member in members[:-1]), initial=0))
    if not stacked:
        return GroupWeights(None, tuple(members), starts)
    stack = torch.cat([member.a_RI for member in members if member is not None])
    placed = [
        member and replace(member, a_RI=stack[start : start + member.rank])
        for start, member in zip(starts, members, strict=True)
    ]
    return GroupWeights(stack, tuple(placed), starts)


class AdapterSlots:
    """At most `max_loaded` versions; the least recently used one without a running request makes room.

    A version takes a slot when a request starts to run, not while it is queued, so `max_loaded` >= `max_batch` slots
    are enough for any mix of adapters. On the CPU a slot is the host copy and a place in the tables that decoding
    reads (`lora_batch`); on another device it is a copy there. The engine's thread alone uses them.

    copy_in: copies an acquired version to the engine's device. on_left: called with each version that has lost its
    slot; its host copy and its cached prefixes stay.
    """

    def __init__(
        self, max_loaded: int, copy_in: Callable[[str], LoadedAdapter], on_left: Callable[[str], None]
    ) -> None:
        self._max_loaded, self._copy_in, self._on_left = max_loaded, copy_in, on_left
        self._slots: dict[str, LoadedAdapter] = {}  # least recently used first
        self._rows: dict[str, int] = {}

    def can_acquire(self, version: str) -> bool:
        """True: a request of this version can start. It has a slot, or one is empty or idle."""
        return version in self._slots or len(self._slots) < self._max_loaded or self._first_idle() is not None

    def acquire(self, version: str) -> LoadedAdapter:
        """Takes the version's slot for one more running request; `can_acquire` was checked before."""
        adapter = self._slots.pop(version, None)
        if adapter is None:
            if len(self._slots) >= self._max_loaded:
                idle = self._first_idle()
                assert idle is not None, "acquired without `can_acquire`"
                self.empty(idle)
            adapter = self._copy_in(version)
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

    def _first_idle(self) -> str | None:
        return next((v for v in self._slots if not self._rows[v]), None)
