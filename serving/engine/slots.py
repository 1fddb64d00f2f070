"""The host tier: loaded adapter versions, who holds them, and when their memory goes back.

Each is packed for the engine in one buffer of this machine's memory; `AdapterSlots` copies it from there to its slot.
Any thread may call the pool; one lock guards it. Weights never change: an update is another version.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch

from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapter_bytes import all_finite
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.changes import (
    AdapterWeights,
    InputRows,
    OutputRows,
    SiteBottleneck,
    SiteScale,
    SiteWeights,
    VirtualTokens,
)
from graftwork.serving.engine.adapters.read import read_adapter
from graftwork.serving.engine.flat import common_buffer, copy_to_device, flatten, tensors_of
from graftwork.serving.engine.sites import LoraLayer
from graftwork.serving.engine.types import SlotState


@dataclass(frozen=True)
class GroupWeights:
    """The adapter of linears with a common input. a_RI: the members' lora_A in one, [sum of ranks, in], where a GPU's
    kernels read them; elsewhere None."""

    a_RI: torch.Tensor | None
    members: tuple[SiteWeights | None, ...]
    """By member number; each member's a_RI is a view of the stack where there is one. None: not adapted."""
    starts: tuple[int, ...]
    """First line of each member, all ranks one below the other."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One adapter version on the engine's device."""

    version: str
    rank: int
    groups: Mapping[str, GroupWeights]
    """LoRA by group of linears; empty for an adapter without it."""
    scales: Mapping[str, SiteScale] = field(default_factory=dict)
    """DoRA and IA3: channels that are multiplied, by linear."""
    bottlenecks: Mapping[str, SiteBottleneck] = field(default_factory=dict)
    inputs: InputRows | None = None
    outputs: OutputRows | None = None
    virtual_tokens: VirtualTokens | None = None

    @cached_property
    def only_lora(self) -> bool:
        """Whether `groups` is all that it changes."""
        return bool(self.groups) and self.decodes_by_lora and self.virtual_tokens is None

    @property
    def decodes_by_lora(self) -> bool:
        """Whether `groups` is all that a decoding token needs of it: what stands before the prompt is in its KV."""
        return not (self.scales or self.bottlenecks or self.inputs or self.outputs)


class _PooledAdapter:
    def __init__(self, weights: LoadedAdapter, buffer: torch.Tensor) -> None:
        self.weights, self.buffer = weights, buffer
        self.holders = 0
        self.retired = False


class AdapterPool:
    """Versions in host memory. Who loads decides what goes: nothing is dropped before it is retired.

    device: where the adapters will be computed with; for a GPU the memory is page-locked. stacked: each group's lora_A
    are needed in one; otherwise plain LoRA stays as its file was read, not copied again. narrow: see `read_adapter`.
    on_freed: told each version whose memory went back (any thread, outside the lock).
    """

    def __init__(
        self,
        sites: Mapping[str, list[LoraLayer]],
        base: BaseView,
        *,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        stacked: bool,
        narrow: bool,
        on_freed: Callable[[str], None],
    ) -> None:
        self._groups, self._base, self._stacked, self._narrow = sites, base, stacked, narrow
        self._max_rank, self._dtype = max_rank, dtype
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
            slot = self._find(version)
            slot.retired = True
            freed = self._drop_if_done(version, slot)
        if freed:
            self._on_freed(version)

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
            slot = self._slots[version]
            slot.holders -= 1
            freed = self._drop_if_done(version, slot)
        if freed:
            self._on_freed(version)

    def copy_to_device(self, version: str, device: torch.device) -> LoadedAdapter:
        """A held version on a device; on the CPU the host copy itself."""
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

    def _drop_if_done(self, version: str, slot: _PooledAdapter) -> bool:
        if slot.retired and slot.holders == 0:
            del self._slots[version]
            return True
        return False

    def _read(self, version: str, folder: Path, digests: Mapping[str, str] | None) -> _PooledAdapter:
        read = read_adapter(
            folder, self._base, max_rank=self._max_rank, dtype=self._dtype, digests=digests, narrow=self._narrow
        )
        weights = self._pack(version, read)
        buffer = None if self._pin or not weights.only_lora else common_buffer(_halves(weights))
        if buffer is None:
            weights, buffer = flatten(weights, pin=self._pin)
        if self._dtype == torch.float16 and not all(map(all_finite, tensors_of(weights))):
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
        rows = (read.inputs, read.outputs)
        return LoadedAdapter(version, read.rank, groups, scales, read.bottlenecks, *rows, read.virtual_tokens)


def _halves(weights: LoadedAdapter) -> list[torch.Tensor]:
    members = [member for group in weights.groups.values() for member in group.members if member is not None]
    return [half for member in members for half in (member.a_RI, member.b_OR)]


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
