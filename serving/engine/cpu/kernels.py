"""C kernels that a CPU decodes with: compiled for this machine at first use, and kept in the cache.

They do what is not a matrix product of the base: adapters, attention over keys and values, norms, gates. They are worth
their compiler where vectors are wide. Where there is none, PyTorch does the same work: slower, and with every adapter
copied once more (see `lora_tables`).
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from graftwork import environment
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root

MOST_RANK = 512
"""As in lora.c."""
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
    """Those for values of one type. `add` and `attend` take addresses: `part` and `attention` call them."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype, kind = dtype, _TYPES[dtype]
        self.add = _function(library, f"add_{kind}", "ppiipp")
        self.attend = _function(library, f"attend_{kind}", "p")
        self._rms_norm = _function(library, f"rms_norm_{kind}", "pppiid")
        self._gated = _function(library, f"gated_{kind}", "pppii")

    def rms_norm(self, x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """`weight * (x / sqrt(mean(x * x) + eps))` of each row, the quotient rounded to x's dtype first."""
        x_NH = self._checked(x_NH)
        out_NH = torch.empty_like(x_NH)
        self._rms_norm(x_NH.data_ptr(), weight_H.data_ptr(), out_NH.data_ptr(), *x_NH.shape, eps)
        return out_NH

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`, of equal shapes, silu rounded to their dtype first."""
        gate, up = self._checked(gate), self._checked(up)
        out = torch.empty_like(gate)
        self._gated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), torch.get_num_threads())
        return out

    def _checked(self, values: torch.Tensor) -> torch.Tensor:
        assert values.dtype == self.dtype, f"values in {values.dtype}, kernels for {self.dtype}"
        return values.contiguous()


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
        digest.update(_here(name).read_bytes())
    try:
        folder = build_once(cache_root() / "kernels" / digest.hexdigest()[:24], lambda into: _compile(command, into))
        return ctypes.CDLL(str(folder / _LIBRARY))
    except (OSError, RuntimeError) as error:  # the latter where no home, and so no cache, can be told
        raise NoKernels(str(error)) from error


def _compile(command: str, into: Path) -> None:
    sources = [str(_here(name)) for name in _SOURCES]
    arguments = [*command.split(), *_FLAGS, *sources, "-o", str(into / _LIBRARY)]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=_BUILD_S)
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{command} took more than {_BUILD_S:g} s") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise NoKernels(f"{command} failed: {said}")


def _here(name: str) -> Path:
    return Path(__file__).parent / name
