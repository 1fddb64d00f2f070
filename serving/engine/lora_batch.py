"""LoRA deltas of one step, added to the base's result row by row; a quantised base stays as it is.

Prompt tokens go segment by segment in peft's order of operations, `result + lora_B(lora_A(x)) * scaling`, and are equal
to it bit for bit at equal shape. Decoding tokens (one a request) share work; figures are in docs/log.md.

One adapter with many rows gets matmuls of its own. Adapters with few rows are read in their places (`RankTables`), all
at once: neighbouring places by batched matmul, which reads each weight once for all rows of its adapter; scattered ones
by embedding bags, which need no neighbouring places.
Legend: N decoding tokens, P places, M rows a place at most, L layers, R rank, G members of a group, I in, O out, K
lines of a bag.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn.functional import linear

from graftwork.serving.engine.adapters.format import SiteWeights
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.cpu.host_tuning import new_zeros
from graftwork.serving.engine.cpu.kernels import Addresses, Compiled, Kernels
from graftwork.serving.engine.lora_layers import LoraLayer, LoraPart, LoraSegment, StepDeltas

Rows = slice | torch.Tensor
"""Some of the decoding tokens."""


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


def rank_bucket(rank: int) -> int:
    """8, 16, 32, 64, ...: an adapter of rank 8 never pays for one of rank 64."""
    bucket = 8
    while bucket < rank:
        bucket *= 2
    return bucket


class RankTables:
    """Loaded weights of one rank bucket: one table a linear, each adapter at its place in all of them.

    A place is written when an adapter takes its slot and read there by every step, so it costs a step nothing which
    adapters run together. It is contiguous, [in, ranks] and [rank, out], for batched matmul and embedding bags alike.
    The tables of a linear that every layer has are one tensor, and a file has the layers' weights at equal distances:
    some 70 operations write an adapter, not 420.
    """

    def __init__(
        self, bucket: int, groups: Mapping[str, list[LoraLayer]], places: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bucket = bucket
        self._groups, self._places, self._dtype, self._device = groups, places, dtype, device
        self._kinds = _group_kinds(groups)
        self._stacks: dict[tuple[str, str], torch.Tensor] = {}
        """[L, P, ...] by half ("a", "b") and the name of the kind's first group or site."""
        self._a: dict[str, torch.Tensor] = {}
        self._b: dict[str, torch.Tensor] = {}
        """Layers of the stacks that an adapter has touched."""
        self._free = list(reversed(range(places)))

    def alloc(self, weights: LoadedAdapter) -> int | None:
        """Writes the adapter into a free place and returns it; None where there is none."""
        if not self._free:
            return None
        place = self._free.pop()
        for kind in self._kinds:
            for member in range(len(kind[0])):
                self._make_tables(kind, member, weights)
                self._write(kind, member, weights, place)
        return place

    def free(self, place: int) -> None:
        """The place may be written again: no step reads it any more."""
        self._free.append(place)

    def a(self, group: str) -> torch.Tensor:
        """lora_A of all places, transposed, [P, I, G * R]: line i is what input i gives to every member."""
        return self._a[group]

    def b(self, site: LoraLayer) -> torch.Tensor:
        """lora_B of all places, transposed, with its scaling folded in: [P, R, O]."""
        return self._b[site.name]

    def _make_tables(self, kind: "Kind", member: int, weights: LoadedAdapter) -> None:
        """Tables for what no adapter of this bucket has adapted before. Other places of them are zero."""
        for layer, sites in enumerate(kind):
            site = sites[member]
            if site.group not in weights.groups:
                continue
            if site.group not in self._a:
                lines, width = site.shape.in_features, len(sites) * self.bucket
                self._a[site.group] = self._stack(("a", kind[0][0].group), len(kind), lines, width)[layer]
            if site.name not in self._b and weights.groups[site.group].members[member] is not None:
                stack = self._stack(("b", kind[0][member].name), len(kind), self.bucket, site.shape.out_features)
                self._b[site.name] = stack[layer]

    def _write(self, kind: "Kind", member: int, weights: LoadedAdapter, place: int) -> None:
        """One linear of every layer; what the adapter leaves alone becomes zero."""
        first = member * self.bucket
        parts: list[_Part] = []
        for layer, sites in enumerate(kind):
            site = sites[member]
            if site.group in self._a:
                group = weights.groups.get(site.group)
                parts.append((layer, group.members[member] if group else None, site.name in self._b))
        for layers, (_, part, has_b), step_a, step_b in _runs(parts):
            a_LIR = self._stacks["a", kind[0][0].group][layers, place, :, first : first + self.bucket]
            b_LRO = self._stacks["b", kind[0][member].name][layers, place] if has_b else None
            rank = part.rank if part else 0
            if rank < self.bucket:  # a slice that is empty costs as much as one that is not
                a_LIR[:, :, rank:].zero_()
                a_LIR = a_LIR[:, :, :rank]
                if b_LRO is not None:
                    b_LRO[:, rank:].zero_()
                    b_LRO = b_LRO[:, :rank]
            if part is not None and b_LRO is not None:
                count = layers.stop - layers.start
                a_LIR.copy_(_space_rows(part.a_RI, count, step_a).transpose(1, 2))
                torch.mul(_space_rows(part.b_OR, count, step_b).transpose(1, 2), part.scaling, out=b_LRO)

    def _stack(self, key: tuple[str, str], layers: int, lines: int, width: int) -> torch.Tensor:
        if key not in self._stacks:
            self._stacks[key] = new_zeros((layers, self._places, lines, width), self._dtype, self._device)
        return self._stacks[key]


Kind = list[list[LoraLayer]]
"""Groups of equal shapes whose names differ in numbers alone, in order: the layers of one linear or more."""
_Part = tuple[int, SiteWeights | None, bool]
"""One linear of a layer that has tables: its number, what is written, and whether lora_B has a table too."""


def _group_kinds(groups: Mapping[str, list[LoraLayer]]) -> list[Kind]:
    kinds: dict[tuple[object, ...], Kind] = {}
    for name, sites in groups.items():
        kinds.setdefault((re.sub(r"\d+", "#", name), *(site.shape for site in sites)), []).append(sites)
    return list(kinds.values())


def _runs(parts: Iterable[_Part]) -> list[tuple[slice, _Part, int, int]]:
    """Neighbouring layers that one operation writes: the layers, the first one's part, and how many values further the
    next one's lora_A and lora_B lie."""
    runs: list[tuple[list[_Part], int, int]] = []
    for item in parts:
        run, step_a, step_b = runs[-1] if runs else ([], 0, 0)
        steps = _steps(run[-1], item) if run else None
        if steps is not None and (len(run) == 1 or steps == (step_a, step_b)):
            run.append(item)
            runs[-1] = (run, *steps)
        else:
            runs.append(([item], 0, 0))
    return [(slice(run[0][0], run[-1][0] + 1), run[0], a, b) for run, a, b in runs]


def _steps(last: _Part, item: _Part) -> tuple[int, int] | None:
    """Values from one layer's halves to the next one's; None where the two can't be written together."""
    (layer, one, has_b), (after, other, other_has_b) = last, item
    if after != layer + 1 or has_b != other_has_b:
        return None
    if one is None or other is None:
        return (0, 0) if one is other else None
    halves = (one.a_RI, one.b_OR, other.a_RI, other.b_OR)
    one_memory = len({half.untyped_storage().data_ptr() for half in halves}) == 1
    if one.scaling != other.scaling or one.rank != other.rank or not one_memory:
        return None
    if not all(half.is_contiguous() for half in halves):
        return None
    size = one.a_RI.element_size()
    bytes_a, bytes_b = other.a_RI.data_ptr() - one.a_RI.data_ptr(), other.b_OR.data_ptr() - one.b_OR.data_ptr()
    if bytes_a <= 0 or bytes_b <= 0 or bytes_a % size or bytes_b % size:
        return None
    return bytes_a // size, bytes_b // size


def _space_rows(half: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """`count` matrices like `half`, each `step` values after the one before: [count, *half]."""
    return half.as_strided((count, *half.shape), (step, *half.stride()))


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
            a_PIR = self._tables[group] = self._own_part(self._live.tables.a(group))
        x_PMI = x_NI[self._rows] if self._straight else x_NI.index_select(0, self._gather_PM)
        return torch.bmm(x_PMI.view(self._count, self._most, -1), a_PIR)

    def expand(self, site: LoraLayer, shrunk: torch.Tensor, out_NO: torch.Tensor) -> None:
        if (site.group, site.member) not in self._live.touched:
            return
        key = site.name + ".b"
        b_PRO = self._tables.get(key)
        if b_PRO is None:
            b_PRO = self._tables[key] = self._own_part(self._live.tables.b(site))
        own_PMR = self._live.member(site, shrunk)
        if self._straight:
            out_NO[self._rows].view(self._count, self._most, -1).baddbmm_(own_PMR, b_PRO)
            return
        delta_NO = torch.bmm(own_PMR, b_PRO).view(-1, out_NO.shape[-1]).index_select(0, self._spots_N)
        _addpick(out_NO, self._rows, delta_NO)

    def _own_part(self, table: torch.Tensor) -> torch.Tensor:
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
        order = sorted(range(len(decoding)), key=lambda row: self._locate_weights(decoding[row]))
        return None if order == list(range(len(decoding))) else order

    def _locate_weights(self, weights: LoadedAdapter | None) -> tuple[int, int, str]:
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
        return parts + [self._table_parts(tables, active, rows) for tables, active in buckets.items()]

    def _table_parts(
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
