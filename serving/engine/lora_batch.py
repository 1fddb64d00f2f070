"""LoRA deltas of one step, added to the base's result row by row; a quantised base stays as it is.

Prompt tokens go segment by segment in peft's order of operations, `result + lora_B(lora_A(x)) * scaling`, and are equal
to it bit for bit at equal shape. Decoding tokens (one a request) share work; figures are in docs/log.md.

One adapter with many rows gets matmuls of its own. Adapters with few rows are read in their places (`lora_tables`), all
at once: neighbouring places by batched matmul, which reads each weight once for all rows of its adapter; scattered ones
by embedding bags, which need no neighbouring places.
Legend: N decoding tokens, P places, M rows a place at most, R rank, I in, O out, K lines of a bag.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear

from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.cpu.kernels import Addresses, Compiled, Kernels
from graftwork.serving.engine.lora_layers import LoraLayer
from graftwork.serving.engine.lora_tables import RankTables, rank_bucket

Rows = slice | torch.Tensor
"""Some of the decoding tokens."""


class LoraPart(Protocol):
    """Some adapters of one step. `shrink` is called once a group, `expand` with its result once a linear of it."""

    def shrink(self, group: str, x_NI: torch.Tensor) -> torch.Tensor | None:
        """lora_A of every member on the part's rows; None where none of its adapters touches the group."""

    def expand(self, site: LoraLayer, shrunk: torch.Tensor, out_NO: torch.Tensor) -> None:
        """Adds the deltas of one linear to the part's rows of `out_NO`."""


class SingleAdapterLora:
    """One adapter on its rows."""

    def __init__(self, weights: LoadedAdapter, rows: Rows) -> None:
        self._weights, self._rows = weights, rows

    def shrink(self, group: str, x_NI: torch.Tensor) -> torch.Tensor | None:
        weights = self._weights.groups.get(group)
        if weights is None:
            return None
        x_MI = x_NI[self._rows]
        return x_MI if weights.a_RI is None else linear(x_MI, weights.a_RI)

    def expand(self, site: LoraLayer, shrunk: torch.Tensor, out_NO: torch.Tensor) -> None:
        group = self._weights.groups[site.group]
        weights = group.members[site.member]
        if weights is None:
            return
        a_RI, b_OR = weights.widened(out_NO.dtype)
        if group.a_RI is None:
            shrunk_MR = linear(shrunk, a_RI)
        else:
            start = group.starts[site.member]
            shrunk_MR = shrunk[:, start : start + weights.rank]
        if isinstance(self._rows, slice):
            out_NO[self._rows].addmm_(shrunk_MR, b_OR.t(), alpha=weights.scaling)
        else:
            out_NO.index_add_(0, self._rows, linear(shrunk_MR, b_OR), alpha=weights.scaling)


class ActiveAdapters:
    """Linears that the adapters of a step touch, in one rank bucket's tables."""

    def __init__(self, tables: RankTables, active: Iterable[LoadedAdapter]) -> None:
        self.tables = tables
        self.touched: set[str | tuple[str, int]] = set()
        """Groups, and members of them."""
        for weights in active:
            for group, parts in weights.groups.items():
                self.touched.add(group)
                self.touched.update((group, n) for n, part in enumerate(parts.members) if part is not None)

    def member(self, site: LoraLayer, shrunk: torch.Tensor) -> torch.Tensor:
        """The part of a group's shrunk input that is the site's own."""
        first = site.member * self.tables.bucket
        return shrunk[..., first : first + self.tables.bucket]


class BatchedMatmulLora:
    """Adapters in neighbouring places, all by two batched matmuls a linear: each weight is read once.

    Where the rows stand as the places do, as many for each, both are read and the deltas added as they lie. Otherwise
    rows are copied together (any row where a place has fewer) and the deltas that mean something are picked out.
    """

    def __init__(self, live: ActiveAdapters, pairs: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._live, self._first = live, min(place for _, place in pairs)
        self._count = max(place for _, place in pairs) + 1 - self._first
        places: list[list[int]] = [[] for _ in range(self._count)]
        for row, place in pairs:
            places[place - self._first].append(row)
        self._most = max(map(len, places))
        gather = [row for rows in places for row in [*rows, *[0] * (self._most - len(rows))]]
        spots = {row: n * self._most + m for n, rows in enumerate(places) for m, row in enumerate(rows)}
        self._rows = pick(sorted(spots), device)
        self._straight = isinstance(self._rows, slice) and gather == sorted(spots)
        if not self._straight:
            self._gather_PM = torch.tensor(gather, device=device)
            self._spots_N = torch.tensor([spots[row] for row in sorted(spots)], device=device)
        self._tables: dict[str, torch.Tensor] = {}

    def shrink(self, group: str, x_NI: torch.Tensor) -> torch.Tensor | None:
        if group not in self._live.touched:
            return None
        a_PIR = self._tables.get(group)
        if a_PIR is None:
            a_PIR = self._tables[group] = self._mine(self._live.tables.a(group))
        x_PMI = x_NI[self._rows] if self._straight else x_NI.index_select(0, self._gather_PM)
        return torch.bmm(x_PMI.view(self._count, self._most, -1), a_PIR)

    def expand(self, site: LoraLayer, shrunk: torch.Tensor, out_NO: torch.Tensor) -> None:
        if (site.group, site.member) not in self._live.touched:
            return
        key = site.name + ".b"
        b_PRO = self._tables.get(key)
        if b_PRO is None:
            b_PRO = self._tables[key] = self._mine(self._live.tables.b(site))
        own_PMR = self._live.member(site, shrunk)
        if self._straight:
            out_NO[self._rows].view(self._count, self._most, -1).baddbmm_(own_PMR, b_PRO)
            return
        delta_NO = torch.bmm(own_PMR, b_PRO).view(-1, out_NO.shape[-1]).index_select(0, self._spots_N)
        _addpick(out_NO, self._rows, delta_NO)

    def _mine(self, table: torch.Tensor) -> torch.Tensor:
        return table[self._first : self._first + self._count]


class EmbeddingBagLora:
    """Adapters in scattered places: a token's delta is a sum of its adapter's lines, each times a number; a bag."""

    def __init__(self, live: ActiveAdapters, pairs: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._live = live
        self._rows = pick([row for row, _ in pairs], device)
        self._places_N = torch.tensor([place for _, place in pairs], device=device)
        self._lines: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def shrink(self, group: str, x_NI: torch.Tensor) -> torch.Tensor | None:
        if group not in self._live.touched:
            return None
        return self._bag(self._live.tables.a(group), x_NI[self._rows])

    def expand(self, site: LoraLayer, shrunk: torch.Tensor, out_NO: torch.Tensor) -> None:
        if (site.group, site.member) in self._live.touched:
            delta_NO = self._bag(self._live.tables.b(site), self._live.member(site, shrunk))
            _addpick(out_NO, self._rows, delta_NO)

    def _bag(self, table: torch.Tensor, factors_NK: torch.Tensor) -> torch.Tensor:
        """Row n: the sum of its place's K lines of the table, each times its factor."""
        count = factors_NK.shape[1]
        if count not in self._lines:
            lines_NK = self._places_N[:, None] * count + torch.arange(count, device=table.device)
            starts_N = torch.arange(0, lines_NK.numel(), count, device=table.device)
            self._lines[count] = (lines_NK.flatten().int(), starts_N.int())
        lines, starts = self._lines[count]
        summed: torch.Tensor = torch.embedding_bag(
            table.view(-1, table.shape[-1]), lines, starts, mode=0, per_sample_weights=factors_NK.reshape(-1)
        )[0]
        return summed


def pick(rows: Sequence[int], device: torch.device) -> Rows:
    """Decoding tokens of a part, in ascending order; a slice where they are neighbours."""
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _addpick(out_NO: torch.Tensor, rows: Rows, delta_NO: torch.Tensor) -> None:
    if isinstance(rows, slice):
        out_NO[rows].add_(delta_NO)
    else:
        out_NO.index_add_(0, rows, delta_NO)


_MANY_ROWS, _MANY_READ = 8, 16
"""Above it an adapter's rows are worth matmuls of their own, instead of tables, instead of the kernel."""


@dataclass(frozen=True)
class LoraSegment:
    """Packed tokens `first` to `stop` run with one adapter."""

    first: int
    stop: int
    weights: LoadedAdapter


class StepDeltas:
    """Deltas that `Sites` adds during one forward pass: the decoding tokens' `parts`, the prompt tokens' segments."""

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
            group = segment.weights.groups.get(site.group)
            weights = group.members[site.member] if group else None
            if weights is not None:
                x_SI = x_TI[segment.first : segment.stop]
                a_RI, b_OR = weights.widened(x_SI.dtype)
                out_TO[segment.first : segment.stop] += linear(linear(x_SI, a_RI), b_OR) * weights.scaling
        return result


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
        """True: decoding reads adapters in host memory, of 16 bits as well as of the engine's."""
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
        self._addresses.places.pop(version, None)
        if version in self._places:
            tables, place = self._places.pop(version)
            tables.free(place)

    def order(self, decoding: Sequence[LoadedAdapter | None]) -> list[int] | None:
        """The order of decoding tokens in which rows of one adapter, and of neighbouring places, stand together:
        weights and rows are then read in their places. None: as they come, which is all the same to the kernel.
        """
        if self._kernels is not None:
            return None
        order = sorted(range(len(decoding)), key=lambda row: self._spot(decoding[row]))
        return None if order == list(range(len(decoding))) else order

    def _spot(self, weights: LoadedAdapter | None) -> tuple[int, int, str]:
        if weights is None or not weights.groups:
            return (0, 0, "")
        tables, place = self._places.get(weights.version, (None, 0))
        return (tables.bucket if tables is not None else 1, place, weights.version)

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
            if weights.version in self._addresses.places and len(own) <= _MANY_READ:
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
