"""Where loaded adapters lie for decoding: one table a linear and rank bucket, each adapter at its place in all of them.

A place is written when an adapter takes its slot and read as it lies by every step, so it costs a step nothing which
adapters run together. A place is contiguous, [in, ranks] and [rank, out], for both ways to read it: batched matmul over
neighbouring places and embedding bags over single ones (see `parts`).
Legend: P places, R rank bucket, G members of a group, I in, O out.
"""

import math
from collections.abc import Mapping, Sequence

import numpy
import torch

from graftwork.serving.engine.adapters.changes import SiteWeights
from graftwork.serving.engine.sites import Site
from graftwork.serving.engine.slots import AdapterWeights, GroupWeights


def rank_bucket(rank: int) -> int:
    """8, 16, 32, 64, ...: an adapter of rank 8 never pays for one of rank 64."""
    bucket = 8
    while bucket < rank:
        bucket *= 2
    return bucket


class RankTables:
    """The adapters of one rank bucket."""

    def __init__(
        self, bucket: int, groups: Mapping[str, list[Site]], places: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bucket = bucket
        self._groups, self._places, self._dtype, self._device = groups, places, dtype, device
        self._a: dict[str, torch.Tensor] = {}
        self._b: dict[str, torch.Tensor] = {}
        self._free = list(reversed(range(places)))

    def take(self, weights: AdapterWeights) -> int | None:
        """Writes the adapter into a free place and returns it; None where there is none."""
        if not self._free:
            return None
        place = self._free.pop()
        for name, own in weights.groups.items():
            self._make_tables(self._groups[name], own)
        for name in self._a:
            self._write(self._groups[name], weights.groups.get(name), place)
        return place

    def give_back(self, place: int) -> None:
        """The place may be written again: no step reads it any more."""
        self._free.append(place)

    def a(self, group: str) -> torch.Tensor:
        """lora_A of all places, transposed, [P, I, G * R]: line i is what input i gives to every member."""
        return self._a[group]

    def b(self, site: Site) -> torch.Tensor:
        """lora_B of all places, transposed, with its scaling folded in: [P, R, O]."""
        return self._b[site.name]

    def _make_tables(self, sites: Sequence[Site], parts: GroupWeights) -> None:
        """Tables for what no adapter of this bucket has adapted before. Other places of them are zero."""
        if sites[0].group not in self._a:
            self._a[sites[0].group] = self._zeros(sites[0].shape.in_features, len(sites) * self.bucket)
        for site in sites:
            if parts.members[site.member] is not None and site.name not in self._b:
                self._b[site.name] = self._zeros(self.bucket, site.shape.out_features)

    def _write(self, sites: Sequence[Site], parts: GroupWeights | None, place: int) -> None:
        """One adapter's group; what it does not adapt becomes zero."""
        for site in sites:
            part = parts.members[site.member] if parts else None
            first = site.member * self.bucket
            _write_a(part, self._a[site.group][place, :, first : first + self.bucket])
            if site.name in self._b:
                _write_b(part, self._b[site.name][place])

    def _zeros(self, lines: int, width: int) -> torch.Tensor:
        shape = (self._places, lines, width)
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # calloc: not resident until a place is written
        size_bytes = math.prod(shape) * self._dtype.itemsize
        return torch.from_numpy(numpy.zeros(size_bytes, numpy.uint8)).view(self._dtype).view(shape)


def _write_a(part: SiteWeights | None, a_IR: torch.Tensor) -> None:
    rank = part.rank if part else 0
    if rank < a_IR.shape[1]:  # a slice that is empty costs as much as one that is not
        a_IR[:, rank:].zero_()
        a_IR = a_IR[:, :rank]
    if part is not None:
        a_IR.copy_(part.a_RI.t())


def _write_b(part: SiteWeights | None, b_RO: torch.Tensor) -> None:
    rank = part.rank if part else 0
    if rank < len(b_RO):
        b_RO[rank:].zero_()
        b_RO = b_RO[:rank]
    if part is not None:
        torch.mul(part.b_OR.t(), part.scaling, out=b_RO)
