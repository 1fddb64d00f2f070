"""Attention of decoding tokens by the C kernel: each row over its own keys and values, read in place.

Legend: N decoding tokens, H query heads, K key-value heads, D head size.
"""

import ctypes
from collections.abc import Sequence

import numpy
import torch

from graftwork.serving.engine.cpu.kernels import Kernels
from graftwork.serving.engine.kv_cache import KvRow, KvStore

_LANES, _MOST_HEAD = 16, 256
"""A head's values are whole vectors, at most so many: decode.c."""


class _Attention(ctypes.Structure):
    """struct attention of decode.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "q", "k", "v", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "size", "window", "writes")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def fits(head_dim: int) -> bool:
    """Whether heads of that size can be attended to."""
    return head_dim % _LANES == 0 and head_dim <= _MOST_HEAD


class DecodeRows:
    """The decoding tokens of one step, in the order in which they are packed. lengths: keys each one looks at."""

    def __init__(self, kernels: Kernels, kv: KvStore, rows: Sequence[KvRow], lengths: Sequence[int]) -> None:
        self._attend, self._dtype, self._kv = kernels.attend, kernels.dtype, kv
        places = [row.page * kv.page_tokens + row.index * row.cap for row in rows]
        self._table = numpy.array([places, [row.cap for row in rows], lengths], numpy.int64)
        first, step = self._table.ctypes.data, self._table.strides[0]
        self._rows = numpy.array(
            [len(rows), torch.get_num_threads(), first, first + step, first + 2 * step], numpy.int64
        )
        self._call = _Attention(rows=self._rows.ctypes.data)

    def takes(self, layer: int, query_NHD: torch.Tensor, values_NKD: torch.Tensor) -> bool:
        """Whether the kernel can do it. values_NKD: the new ones."""
        size, together = query_NHD.shape[-1], (query_NHD, values_NKD, self._kv.keys[layer])
        return fits(size) and all(part.shape[-1] == size and part.dtype == self._dtype for part in together)

    def attend(
        self,
        layer: int,
        query_NHD: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        out_NHD: torch.Tensor,
        *,
        writes: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Attends into `out_NHD`, contiguous. fresh: the new keys and values [N, K, D], which are put into their places
        first where `writes`."""
        key_NKD, value_NKD = (part if part.stride(-1) == 1 else part.contiguous() for part in fresh)
        query_NHD = query_NHD if query_NHD.stride(-1) == 1 else query_NHD.contiguous()
        call, heads = self._call, key_NKD.shape[1]
        call.q, call.k, call.v = query_NHD.data_ptr(), key_NKD.data_ptr(), value_NKD.data_ptr()
        call.keys, call.values = self._kv.keys[layer].data_ptr(), self._kv.values[layer].data_ptr()
        call.out = out_NHD.data_ptr()
        call.q_row, call.q_head = query_NHD.stride()[:2]
        call.k_row, call.k_head = key_NKD.stride()[:2]
        call.v_row, call.v_head = value_NKD.stride()[:2]
        call.heads, call.groups, call.size = heads, query_NHD.shape[1] // heads, query_NHD.shape[2]
        call.window, call.writes, call.scale, call.softcap = window or 0, writes, scale, softcap or 0.0
        self._attend(ctypes.addressof(call))
