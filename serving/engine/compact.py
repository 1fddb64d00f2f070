"""The compact active set: adapters that decode now, stacked by rank so that one batched matmul serves all of them.

Adapters of equal rank bucket stand side by side in [places, ...] tensors. A step reads only the places in use; when the
set of running adapters changes, just the new ones are copied in. lora_B is kept transposed with its scaling folded in.
"""

from collections.abc import Mapping, Sequence

import torch

from graftwork.serving.engine.sites import Site
from graftwork.serving.engine.slots import AdapterWeights, GroupWeights


def rank_bucket(rank: int) -> int:
    """8, 16, 32, 64, ...: an adapter of rank 8 never pays for one of rank 64."""
    bucket = 8
    while bucket < rank:
        bucket *= 2
    return bucket


class CompactSet:
    """Stacked weights of the active adapters of one rank bucket. The engine's thread alone uses it."""

    def __init__(self, bucket: int, groups: Mapping[str, list[Site]], dtype: torch.dtype, device: torch.device) -> None:
        self.bucket = bucket
        self._groups, self._dtype, self._device = groups, dtype, device
        self._places: list[AdapterWeights | None] = []
        self._room = 0
        self._a: dict[str, torch.Tensor] = {}
        self._b: dict[str, torch.Tensor] = {}
        self._live: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self._places)

    def assign(self, active: Sequence[AdapterWeights]) -> dict[str, int]:
        """Gives every active adapter a place; at most one place in five is left unused. Returns {version: place}."""
        wanted = {weights.version: weights for weights in active}
        kept = [weights if weights and weights.version in wanted else None for weights in self._places]
        held = {weights.version for weights in kept if weights}
        moved = [weights for version, weights in wanted.items() if version not in held]
        if kept != self._places or moved:
            self._rearrange(kept, moved)
        return {weights.version: place for place, weights in enumerate(self._places) if weights}

    def forget(self, version: str) -> None:
        """Drops the reference to a freed adapter."""
        self._places = [None if weights and weights.version == version else weights for weights in self._places]

    def shrinks(self, group: str) -> bool:
        """Whether any active adapter touches the group."""
        return group in self._live

    def a(self, group: str) -> torch.Tensor:
        """lora_A of the places in use: [places, members * bucket, in]."""
        return self._a[group][: len(self._places)]

    def b(self, site: Site) -> torch.Tensor | None:
        """Transposed, scaled lora_B: [places, bucket, out]; None where no active adapter has it."""
        return self._b[site.name][: len(self._places)] if site.name in self._live else None

    def _rearrange(self, kept: list[AdapterWeights | None], fresh: list[AdapterWeights]) -> None:
        """Fills gaps with new adapters, then with the last ones, until few gaps are left."""
        gaps = [place for place, weights in enumerate(kept) if weights is None]
        self._places = kept
        for weights in fresh:
            self._put(weights, gaps.pop(0) if gaps else len(self._places))
        while self._places and (self._places[-1] is None or self._places.count(None) * 5 > len(self._places)):
            last = self._places.pop()
            if last is not None:
                self._put(last, self._places.index(None))
        self._live = frozenset(
            name
            for weights in self._places
            if weights
            for group, parts in weights.groups.items()
            for name in (group, *(self._groups[group][m].name for m, part in enumerate(parts.members) if part))
        )

    def _put(self, weights: AdapterWeights, place: int) -> None:
        if place == len(self._places):
            self._places.append(None)
        if place >= self._room:
            self._grow()
        self._places[place] = weights
        for name, sites in self._groups.items():
            if name in weights.groups or name in self._a:
                self._copy(name, sites, weights.groups.get(name), place)

    def _copy(self, name: str, sites: list[Site], parts: GroupWeights | None, place: int) -> None:
        """Writes one adapter's group into its place; what it does not adapt becomes zero."""
        if name not in self._a:
            self._a[name] = self._zeros(len(sites) * self.bucket, sites[0].shape.in_features)
        a_RI = self._a[name][place].zero_()
        for site in sites:
            part = parts.members[site.member] if parts else None
            if part is None and site.name not in self._b:
                continue
            if site.name not in self._b:
                self._b[site.name] = self._zeros(self.bucket, site.shape.out_features)
            b_RO = self._b[site.name][place].zero_()
            if part is not None:
                a_RI[site.member * self.bucket :][: part.rank] = part.a_RI
                torch.mul(part.b_OR.t(), part.scaling, out=b_RO[: part.rank])

    def _grow(self) -> None:
        self._room = max(4, 2 * self._room)
        for tensors in (self._a, self._b):
            for name, old in tensors.items():
                tensors[name] = self._zeros(*old.shape[1:])
                tensors[name][: len(old)] = old

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self._room, *shape, dtype=self._dtype, device=self._device)
