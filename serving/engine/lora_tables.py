"""Tables of loaded LoRA weights for decoding: one a linear and rank bucket, each adapter at its place in all of them.

A place is written when an adapter takes its slot and read as it lies by every step, so it costs a step nothing which
adapters run together. A place is contiguous, [in, ranks] and [rank, out], for both ways to read it: batched matmul over
neighbouring places and embedding bags over single ones (see `lora_batch`). The tables of a linear that every layer has
are one tensor, and a file has the layers' weights at equal distances: some 70 operations write an adapter, not 420.
Legend: L layers, P places, R rank bucket, G members of a group, I in, O out.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from graftwork.serving.engine.adapters.format import SiteWeights
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.cpu.host_tuning import new_zeros
from graftwork.serving.engine.lora_layers import LoraLayer


def rank_bucket(rank: int) -> int:
    """8, 16, 32, 64, ...: an adapter of rank 8 never pays for one of rank 64."""
    bucket = 8
    while bucket < rank:
        bucket *= 2
    return bucket


class RankTables:
    """The adapters of one rank bucket."""

    def __init__(
        self, bucket: int, groups: Mapping[str, list[LoraLayer]], places: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bucket = bucket
        self._groups, self._places, self._dtype, self._device = groups, places, dtype, device
        self._kinds = _alike(groups)
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
                a_LIR.copy_(_spaced(part.a_RI, count, step_a).transpose(1, 2))
                torch.mul(_spaced(part.b_OR, count, step_b).transpose(1, 2), part.scaling, out=b_LRO)

    def _stack(self, key: tuple[str, str], layers: int, lines: int, width: int) -> torch.Tensor:
        if key not in self._stacks:
            self._stacks[key] = new_zeros((layers, self._places, lines, width), self._dtype, self._device)
        return self._stacks[key]


Kind = list[list[LoraLayer]]
"""Groups of equal shapes whose names differ in numbers alone, in order: the layers of one linear or more."""
_Part = tuple[int, SiteWeights | None, bool]
"""One linear of a layer that has tables: its number, what is written, and whether lora_B has a table too."""


def _alike(groups: Mapping[str, list[LoraLayer]]) -> list[Kind]:
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


def _spaced(half: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """`count` matrices like `half`, each `step` values after the one before: [count, *half]."""
    return half.as_strided((count, *half.shape), (step, *half.stride()))
