"""C kernels that a CPU decodes with: compiled for this machine at first use, and kept in the cache.

They do what is not a matrix product of the base: norms and gates (`Kernels`), attention over keys and values in their
places (`DecodeRows`), and LoRA, read in place from host memory, all adapters of a linear in one call (`Compiled`). They
are worth their compiler where vectors are wide. Where there is none, PyTorch does the same work: slower, and with every
adapter copied once more (see `lora_batch`).
Legend: N decoding tokens, H query heads, K key-value heads, D head size, S linears of the model, P adapters of a part.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from graftwork import environment
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.kv_cache import KvRow, KvStore
from graftwork.serving.engine.lora_layers import LoraLayer
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root

MOST_RANK = 512
"""As in lora.c."""
_HERE = Path(__file__).parent
_SOURCES = ("lora.c", "decode.c")
_HEADERS = ("vectors.h", "lora_rows.h", "lora_pairs.h", "decode_rows.h")
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-shared", "-fPIC", "-Wall")
_LIBRARY = "kernels.so"
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_BUILD_S = 60.0
_log = logging.getLogger(__name__)


class NoKernels(Exception):
    """Why they cannot be used here, in a few words."""


class Kernels:
    """Those for values of one type. `add` and `attend` take addresses: `Compiled` and `DecodeRows` call them."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype, kind = dtype, _TYPES[dtype]
        self.add = _function(library, f"add_{kind}", "ppiipp")
        self.attend = _function(library, f"attend_{kind}", "p")
        self._rms_norm = _function(library, f"rms_norm_{kind}", "pppiid")
        self._gated = _function(library, f"gated_{kind}", "pppii")

    def rms_norm(self, x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """`weight * (x / sqrt(mean(x * x) + eps))` of each row, the quotient rounded to x's dtype first."""
        assert x_NH.dtype == self.dtype, f"values in {x_NH.dtype}, kernels for {self.dtype}"
        x_NH = x_NH.contiguous()
        out_NH = torch.empty_like(x_NH)
        self._rms_norm(x_NH.data_ptr(), weight_H.data_ptr(), out_NH.data_ptr(), *x_NH.shape, eps)
        return out_NH

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`, of equal shapes, silu rounded to their dtype first."""
        assert gate.dtype == up.dtype == self.dtype, f"values in {gate.dtype} and {up.dtype}, kernels for {self.dtype}"
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        self._gated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), torch.get_num_threads())
        return out


def kernels_for(dtype: torch.dtype) -> Kernels | None:
    """None where this machine or type has none; for a machine the reason is logged, once."""
    found = library()
    return Kernels(found, dtype) if found is not None and dtype in _TYPES else None


def _function(library: ctypes.CDLL, name: str, arguments: str) -> Callable[..., None]:
    """arguments: p for an address, i for a whole number, d for a double."""
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
    function = library[name]
    function.argtypes, function.restype = tuple(kinds[one] for one in arguments), None
    return function


@functools.cache
def library() -> ctypes.CDLL | None:
    """Those of this machine, loaded once a process."""
    try:
        return load()
    except NoKernels as reason:
        _log.warning("decoding by PyTorch alone, without the C kernels: %s", reason)
        return None


def load(compiler: str | None = None, flags: Collection[str] | None = None) -> ctypes.CDLL:
    """Compiles them (0.5 s, once a machine and version) and loads them. Raises NoKernels.

    compiler: its command; None takes $CC, cc, gcc or clang. flags: instruction sets; None takes this machine's.
    """
    flags = environment.flags() if flags is None else flags
    if "avx512f" not in flags:
        raise NoKernels("this CPU has no AVX-512, and they are not faster without")
    command = compiler or os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if command is None:
        raise NoKernels("no C compiler (cc, gcc or clang); with one, this engine is faster")
    digest = hashlib.sha256("\n".join((command, *_FLAGS, *sorted(flags))).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    try:
        folder = build_once(cache_root() / "kernels" / digest.hexdigest()[:24], lambda into: _compile(command, into))
        return ctypes.CDLL(str(folder / _LIBRARY))
    except (OSError, RuntimeError) as error:  # the latter where no home, and so no cache, is known
        raise NoKernels(str(error)) from error


def _compile(command: str, into: Path) -> None:
    sources = [str(_HERE / name) for name in _SOURCES]
    arguments = [*command.split(), *_FLAGS, *sources, "-o", str(into / _LIBRARY)]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=_BUILD_S)
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{command} took more than {_BUILD_S:g} s") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise NoKernels(f"{command} failed: {said}")


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
    """Return True where the kernel takes heads of that size."""
    return head_dim % _LANES == 0 and head_dim <= _MOST_HEAD


class DecodeRows:
    """The decoding tokens of one step, in the order in which they are packed. lengths: keys each one looks at."""

    def __init__(self, kernels: Kernels, kv: KvStore, rows: Sequence[KvRow], lengths: Sequence[int]) -> None:
        self._attend, self._dtype, self._kv = kernels.attend, kernels.dtype, kv
        self._table = numpy.array([[row.start for row in rows], [row.cap for row in rows], lengths], numpy.int64)
        first, step = self._table.ctypes.data, self._table.strides[0]
        self._rows = numpy.array(
            [len(rows), torch.get_num_threads(), first, first + step, first + 2 * step], numpy.int64
        )
        self._call = _Attention(rows=self._rows.ctypes.data)

    def takes(self, layer: int, query_NHD: torch.Tensor, values_NKD: torch.Tensor) -> bool:
        """Return True where the kernel can do it. values_NKD: the new ones."""
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


_PLACE = numpy.dtype([("a", "u8"), ("b", "u8"), ("rank", "i8"), ("scaling", "f8"), ("narrow", "i8")])
"""struct place of lora.c."""


class Addresses:
    """Addresses of each adapter's halves, by linear. Holds no weights: an adapter is forgotten before it is freed."""

    def __init__(self, groups: Mapping[str, Sequence[LoraLayer]], dtype: torch.dtype) -> None:
        self.numbers = {site.name: number for number, site in enumerate(s for sites in groups.values() for s in sites)}
        self._groups, self._dtype = groups, dtype
        self.places: dict[str, numpy.ndarray] = {}
        """[S] of each version."""

    def admit(self, weights: LoadedAdapter) -> None:
        """Notes an adapter. One that the kernel cannot read as it lies is left out."""
        places_S = numpy.zeros(len(self.numbers), _PLACE)
        for name, group in weights.groups.items():
            for site, part in zip(self._groups[name], group.members, strict=True):
                if part is None:
                    continue
                halves = (part.a_RI, part.b_OR)
                readable = part.a_RI.dtype == part.b_OR.dtype and part.a_RI.dtype in (self._dtype, torch.bfloat16)
                if part.rank > MOST_RANK or not readable or not all(half.is_contiguous() for half in halves):
                    return
                narrow = part.a_RI.dtype == torch.bfloat16
                addresses = (part.a_RI.data_ptr(), part.b_OR.data_ptr())
                places_S[self.numbers[site.name]] = (*addresses, part.rank, part.scaling, narrow)
        self.places[weights.version] = places_S


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
        columns = [addresses.places[weights.version] for weights in active]
        self._places_SP = numpy.ascontiguousarray(numpy.stack(columns, axis=1))
        self._numbers, self._line = addresses.numbers, self._places_SP.strides[0]
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
        number = self._numbers[site.name]
        if not self._adapted[number]:
            return
        assert out_NO.dtype == self._dtype, f"a linear's result in {out_NO.dtype}, adapters in {self._dtype}"
        assert out_NO.is_contiguous(), "a linear's own fresh result"
        batch, places = self._at
        self._add(
            batch, places + number * self._line, shrunk.shape[1], out_NO.shape[1], shrunk.data_ptr(), out_NO.data_ptr()
        )
