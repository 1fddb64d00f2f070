"""LoRA of decoding tokens by the C kernel: read in place from host memory, all of a linear's in one call.

Legend: S linears of the model, P adapters of a part, N its rows.
"""

from collections.abc import Mapping, Sequence

import numpy
import torch

from graftwork.serving.engine.adapters.format import SiteWeights
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.cpu.kernels import MOST_RANK, Kernels
from graftwork.serving.engine.lora_layers import LoraLayer

_PLACE = numpy.dtype([("a", "u8"), ("b", "u8"), ("rank", "i8"), ("scaling", "f8"), ("narrow", "i8")])
"""struct place of lora.c."""


class Addresses:
    """Where the halves of each adapter lie, by linear. Holds no weights: an adapter is forgotten before it is freed."""

    def __init__(self, groups: Mapping[str, Sequence[LoraLayer]], dtype: torch.dtype) -> None:
        self._sites = {site.name: number for number, site in enumerate(s for sites in groups.values() for s in sites)}
        self._groups, self._dtype = groups, dtype
        self._places: dict[str, numpy.ndarray] = {}

    def admit(self, weights: LoadedAdapter) -> None:
        """Notes an adapter. One that the kernel cannot read as it lies is left out: see `holds`."""
        places_S = numpy.zeros(len(self._sites), _PLACE)
        for name, group in weights.groups.items():
            for site, part in zip(self._groups[name], group.members, strict=True):
                if part is None:
                    continue
                if part.rank > MOST_RANK or not self._readable(part):
                    return
                narrow = part.a_RI.dtype == torch.bfloat16
                addresses = (part.a_RI.data_ptr(), part.b_OR.data_ptr())
                places_S[self._sites[site.name]] = (*addresses, part.rank, part.scaling, narrow)
        self._places[weights.version] = places_S

    def _readable(self, part: SiteWeights) -> bool:
        halves = (part.a_RI, part.b_OR)
        same = part.a_RI.dtype == part.b_OR.dtype and part.a_RI.dtype in (self._dtype, torch.bfloat16)
        return same and all(half.is_contiguous() for half in halves)

    def holds(self, version: str) -> bool:
        return version in self._places

    def forget(self, version: str) -> None:
        self._places.pop(version, None)

    def lookup(self, versions: Sequence[str]) -> numpy.ndarray:
        """[S, P]"""
        return numpy.ascontiguousarray(numpy.stack([self._places[version] for version in versions], axis=1))

    def number(self, site: LoraLayer) -> int:
        return self._sites[site.name]


class Compiled:
    """Some adapters of one step. pairs: (row, number of its adapter among `active`)."""

    def __init__(
        self,
        kernels: Kernels,
        addresses: Addresses,
        active: Sequence[LoadedAdapter],
        pairs: Sequence[tuple[int, int]],
    ) -> None:
        self._add, self._dtype, self._active = kernels.add, kernels.dtype, active
        self._places_SP = addresses.lookup([weights.version for weights in active])
        self._number, self._line = addresses.number, self._places_SP.strides[0]
        self._groups = {group for weights in active for group in weights.groups}
        self._adapted = (self._places_SP["a"] != 0).any(axis=1)
        together = sorted(pairs, key=lambda pair: pair[1])  # rows of one adapter in a row: it is read once
        self._places_N = numpy.array([place for _, place in together], numpy.int32)
        self._rows_N = numpy.array([row for row, _ in together], numpy.int32)
        self._batch = numpy.array(
            [
                len(pairs),
                min(torch.get_num_threads(), len(pairs)),
                self._places_N.ctypes.data,
                self._rows_N.ctypes.data,
            ],
            numpy.int64,
        )
        self._at = (self._batch.ctypes.data, self._places_SP.ctypes.data)

    def shrink(self, group: str, x_NI: torch.Tensor) -> torch.Tensor | None:
        """The input as it is: the kernel does both products at once."""
        if group not in self._groups:
            return None
        assert x_NI.dtype == self._dtype, f"a linear's input in {x_NI.dtype}, adapters in {self._dtype}"
        return x_NI.contiguous()

    def expand(self, site: LoraLayer, shrunk: torch.Tensor, out_NO: torch.Tensor) -> None:
        number = self._number(site)
        if not self._adapted[number]:
            return
        assert out_NO.dtype == self._dtype, f"a linear's result in {out_NO.dtype}, adapters in {self._dtype}"
        assert out_NO.is_contiguous(), "a linear's own fresh result"
        batch, places = self._at
        self._add(
            batch, places + number * self._line, shrunk.shape[1], out_NO.shape[1], shrunk.data_ptr(), out_NO.data_ptr()
        )
