"""The adapter deltas of one step, added to the base's result row by row. Nothing is merged: a 4-bit base stays exact.

Prompt tokens go segment by segment in peft's own order of operations, `result + lora_B(lora_A(x)) * scaling`, and are
equal to it bit for bit at equal shape. Decoding tokens (one a request) share work, see `parts`. Figures: docs/log.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from graftwork.serving.engine.cpu.kernels import Kernels
from graftwork.serving.engine.cpu.part import Addresses, Compiled
from graftwork.serving.engine.parts import (
    ActiveAdapters,
    BatchedMatmulLora,
    EmbeddingBagLora,
    LoraPart,
    SingleAdapterLora,
    pick,
)
from graftwork.serving.engine.sites import LoraLayer
from graftwork.serving.engine.slots import LoadedAdapter
from graftwork.serving.engine.tables import RankTables, rank_bucket

_MANY_ROWS, _MANY_READ = 8, 16
"""Above it an adapter's rows are worth matmuls of their own, instead of tables, instead of the kernel."""


@dataclass(frozen=True)
class LoraSegment:
    """Packed tokens `first` to `stop` run with one adapter."""

    first: int
    stop: int
    weights: LoadedAdapter


class StepDeltas:
    """What `Sites` adds during one forward pass: the decoding tokens' `parts`, the prompt tokens' segments."""

    def __init__(self, parts: Sequence[LoraPart], segments: Sequence[LoraSegment]) -> None:
        self.parts, self._segments = parts, segments
        self._group = ""
        self._input: torch.Tensor | None = None
        self._shrunk: list[torch.Tensor | None] = []

    def add(self, site: LoraLayer, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Adds in place: `result` is the linear's own fresh output."""
        x_TI, out_TO = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
        if self.parts:
            if site.group != self._group or x is not self._input:
                self._group, self._input = site.group, x
                self._shrunk = [part.shrink(site.group, x_TI) for part in self.parts]
            for part, shrunk in zip(self.parts, self._shrunk, strict=True):
                if shrunk is not None:
                    part.expand(site, shrunk, out_TO)
        for segment in self._segments:
            _add_segment(segment, site, x_TI, out_TO)
        return result


def _add_segment(segment: LoraSegment, site: LoraLayer, x_TI: torch.Tensor, out_TO: torch.Tensor) -> None:
    group = segment.weights.groups.get(site.group)
    weights = group.members[site.member] if group else None
    if weights is not None:
        x_SI = x_TI[segment.first : segment.stop]
        a_RI, b_OR = weights.widened(x_SI.dtype)
        out_TO[segment.first : segment.stop] += linear(linear(x_SI, a_RI), b_OR) * weights.scaling


class DeltaPlanner:
    """Chooses how each step's adapters are computed. The engine's thread alone uses it.

    places: how many adapters can be laid out for decoding at once. kernels: they need no such places.
    """

    def __init__(
        self,
        groups: Mapping[str, list[LoraLayer]],
        dtype: torch.dtype,
        device: torch.device,
        places: int = 0,
        kernels: Kernels | None = None,
    ) -> None:
        self._groups, self._dtype, self._device, self._count = groups, dtype, device, places
        self._kernels = kernels
        self._addresses = Addresses(groups, dtype)
        self._tables: dict[int, RankTables] = {}
        self._places: dict[str, tuple[RankTables, int]] = {}
        self._last: tuple[list[LoadedAdapter | None], list[LoraPart]] = ([], [])

    @property
    def reads_in_place(self) -> bool:
        """Whether decoding reads adapters where they lie, of 16 bits as well as of the engine's."""
        return self._kernels is not None

    def admit(self, weights: LoadedAdapter) -> None:
        """Lays an adapter out for decoding. One that finds every place taken decodes by matmuls of its own."""
        if not weights.groups:  # a kind of adapter that has no lora_A and lora_B
            return
        if self._kernels is not None:
            self._addresses.admit(weights)
            return
        bucket = rank_bucket(weights.rank)
        if bucket not in self._tables:
            self._tables[bucket] = RankTables(bucket, self._groups, self._count, self._dtype, self._device)
        place = self._tables[bucket].alloc(weights)
        if place is not None:
            self._places[weights.version] = (self._tables[bucket], place)

    def forget(self, version: str) -> None:
        """Gives the place of an adapter back; no running request uses it."""
        self._last = ([], [])
        self._addresses.forget(version)
        held = self._places.pop(version, None)
        if held is not None:
            held[0].free(held[1])

    def order(self, decoding: Sequence[LoadedAdapter | None]) -> list[int] | None:
        """The order of decoding tokens in which rows of one adapter, and of neighbouring places, stand together:
        weights and rows are then read as they lie. None: as they come, which is all the same to the kernel.
        """
        if self._kernels is not None:
            return None
        order = sorted(range(len(decoding)), key=lambda row: self._spot(decoding[row]))
        return None if order == list(range(len(decoding))) else order

    def _spot(self, weights: LoadedAdapter | None) -> tuple[int, int, str]:
        if weights is None or not weights.groups:
            return (0, 0, "")
        held = self._places.get(weights.version)
        return (held[0].bucket, held[1], weights.version) if held is not None else (1, 0, weights.version)

    def plan(self, decoding: Sequence[LoadedAdapter | None], segments: Sequence[LoraSegment]) -> StepDeltas | None:
        """decoding: the adapter of each decoding token; segments: of the prompt tokens. None: the base alone runs."""
        rows, parts = self._last
        if rows != decoding:
            rows, parts = list(decoding), self._parts(decoding)
            self._last = (rows, parts)
        return StepDeltas(parts, segments) if parts or segments else None

    def _parts(self, decoding: Sequence[LoadedAdapter | None]) -> list[LoraPart]:
        rows: dict[LoadedAdapter, list[int]] = {}
        for row, weights in enumerate(decoding):
            if weights is not None and weights.groups:
                rows.setdefault(weights, []).append(row)
        parts: list[LoraPart] = []
        buckets: dict[RankTables, list[LoadedAdapter]] = {}
        read: list[LoadedAdapter] = []
        for weights, own in rows.items():
            if self._addresses.holds(weights.version) and len(own) <= _MANY_READ:
                read.append(weights)
            elif weights.version in self._places and len(own) <= _MANY_ROWS:
                buckets.setdefault(self._places[weights.version][0], []).append(weights)
            else:
                parts.append(SingleAdapterLora(weights, pick(own, self._device)))
        if read and self._kernels is not None:
            pairs = [(row, number) for number, weights in enumerate(read) for row in rows[weights]]
            parts.append(Compiled(self._kernels, self._addresses, read, pairs))
        return parts + [self._tabled(tables, active, rows) for tables, active in buckets.items()]

    def _tabled(
        self,
        tables: RankTables,
        active: Sequence[LoadedAdapter],
        rows: Mapping[LoadedAdapter, list[int]],
    ) -> LoraPart:
        """Batched where few of the places read and few of the rows computed would be for nothing."""
        places = [self._places[weights.version][1] for weights in active]
        pairs = sorted((row, self._places[weights.version][1]) for weights in active for row in rows[weights])
        reach, most = max(places) + 1 - min(places), max(len(rows[weights]) for weights in active)
        dense = reach * 4 <= len(places) * 5 and reach * most <= 4 * len(pairs)
        return (BatchedMatmulLora if dense else EmbeddingBagLora)(ActiveAdapters(tables, active), pairs, self._device)
