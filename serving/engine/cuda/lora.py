"""Slot table: addresses of the weights of the adapters that decode now, at a fixed address for captured graphs.

A slot is one line of 64-bit words: for each group of linears the address and number of lines of its stacked lora_A, for
each linear the address of its lora_B, its rank and its first line in the stack; scalings have a tensor of their own. To
load, drop or update an adapter changes a line, never an address that a graph holds; an adapter of rank 8 costs rank 8,
and its weights are used where they were loaded. Slots are only as many as requests decode together; an adapter takes
one when it first decodes, and one that is not decoding now gives its slot to the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.lora_layers import LoraLayer

_GROUP_WORDS, _SITE_WORDS = 2, 3


@dataclass(frozen=True)
class GroupColumn:
    """First word of a group: address of its lora_A, lines in it. `lines`: the most that any adapter can have."""

    first: int
    lines: int


@dataclass(frozen=True)
class SiteColumn:
    """First word of a linear: address of its lora_B, rank (0: not adapted), first line in the group's lora_A."""

    first: int
    number: int


class SlotTable:
    """Device tensors `entries` [slots, width] int64 and `scalings` [slots, sites] float32; for one thread.

    dtype: of every adapter's weights and of the tokens; an address does not tell.
    """

    def __init__(
        self, groups: Mapping[str, list[LoraLayer]], slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._groups, self.dtype = groups, dtype
        self.groups: dict[str, GroupColumn] = {}
        self.sites: dict[str, SiteColumn] = {}
        for name, sites in groups.items():
            self.groups[name] = GroupColumn(_GROUP_WORDS * len(self.groups), max_rank * len(sites))
        for number, site in enumerate(site for sites in groups.values() for site in sites):
            self.sites[site.name] = SiteColumn(_GROUP_WORDS * len(groups) + _SITE_WORDS * number, number)
        self.width = _GROUP_WORDS * len(groups) + _SITE_WORDS * len(self.sites)
        self.entries = torch.zeros(slots, self.width, dtype=torch.long, device=device)
        self.scalings = torch.zeros(slots, len(self.sites), dtype=torch.float32, device=device)
        self._slot_of: dict[LoadedAdapter, int] = {}  # least recently used first

    def slots(self, adapters: Sequence[LoadedAdapter | None]) -> list[int]:
        """The slot of each token's adapter, -1 for the base; writes the lines of those that have none yet."""
        wanted = dict.fromkeys(weights for weights in adapters if weights is not None)
        for weights in wanted:
            if weights in self._slot_of:
                self._slot_of[weights] = self._slot_of.pop(weights)
        for weights in wanted:
            if weights not in self._slot_of:
                self._place_weights(weights, wanted)
        return [-1 if weights is None else self._slot_of[weights] for weights in adapters]

    def forget(self, version: str) -> None:
        """Drops the reference to a freed adapter, so that its memory goes back."""
        self._slot_of = {weights: slot for weights, slot in self._slot_of.items() if weights.version != version}

    def _place_weights(self, weights: LoadedAdapter, wanted: Mapping[LoadedAdapter, None]) -> None:
        free = set(range(len(self.entries))) - set(self._slot_of.values())
        if not free:
            idle = next((one for one in self._slot_of if one not in wanted), None)
            assert idle is not None, "a step decodes at most as many adapters as there are slots"
            free = {self._slot_of.pop(idle)}
        slot = min(free)
        words, scalings = self._line(weights)
        pinned = self.entries.device.type == "cuda"  # then a copy only queues on the stream, before the step's kernels
        self.entries[slot].copy_(torch.tensor(words, pin_memory=pinned), non_blocking=True)
        self.scalings[slot].copy_(torch.tensor(scalings, pin_memory=pinned), non_blocking=True)
        self._slot_of[weights] = slot

    def _line(self, weights: LoadedAdapter) -> tuple[list[int], list[float]]:
        words, scalings = [0] * self.width, [0.0] * len(self.sites)
        for name, parts in weights.groups.items():
            column = self.groups[name]
            assert parts.a_RI is not None, "the pool stacks for kernels"
            assert parts.a_RI.dtype == self.dtype, f"{parts.a_RI.dtype} weights among {self.dtype} ones"
            words[column.first : column.first + _GROUP_WORDS] = parts.a_RI.data_ptr(), len(parts.a_RI)
            for site in self._groups[name]:
                part = parts.members[site.member]
                if part is not None:
                    own = self.sites[site.name]
                    line = part.b_OR.data_ptr(), part.rank, parts.starts[site.member]
                    words[own.first : own.first + _SITE_WORDS] = line
                    scalings[own.number] = part.scaling
        return words, scalings


ROWS = 16
"""Tokens of a tile at most: the smallest tile of a tensor core's matmul. A tile with one token costs no more memory."""


@dataclass(frozen=True)
class Tiles:
    """Device tensors. slots: [tiles], the adapter's slot or -1; rows: [tiles, ROWS], packed tokens or -1."""

    slots: torch.Tensor
    rows: torch.Tensor


def tiled(slots: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(slot, its tokens) of each tile, from the slot of every token; -1 (the base) is in no tile.

    There are never more tiles than tokens, so that a grid of one tile a token is always enough.
    """
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    return [(slot, own[first : first + ROWS]) for slot, own in rows.items() for first in range(0, len(own), ROWS)]
