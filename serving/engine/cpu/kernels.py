"""The C kernels that a CPU decodes adapters with: compiled for this machine at first use, and kept in the cache.

They are worth their compiler where vectors are wide. Where there is none, PyTorch's batched products do the same work
(see `parts`): slower, and with every adapter copied once more.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from graftwork import cpu
from graftwork.build_once import build_once
from graftwork.storage import cache_root

MOST_RANK = 512
"""As in lora.c."""
_SOURCES = ("lora.c", "lora_rows.h")
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", "-Wall")
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_BUILD_S = 60.0
_log = logging.getLogger(__name__)

AddDeltas = Callable[[int, int, int, int, int, int], None]
"""(batch, places, inputs, outputs, x, out), all but the sizes addresses: see `add` in lora_rows.h."""


class NoKernels(Exception):
    """Why they cannot be used here, in a few words."""


def add_deltas(dtype: torch.dtype) -> AddDeltas | None:
    """The kernel for values of a type; None where this machine has none, which is logged once with the reason."""
    library = _library()
    if library is None or dtype not in _TYPES:
        return None
    function = library[f"add_{_TYPES[dtype]}"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64) + (ctypes.c_void_p,) * 2
    function.restype = None
    call: AddDeltas = function
    return call


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return load()
    except NoKernels as reason:
        _log.warning("decoding tokens' adapters are computed by PyTorch, without the C kernels: %s", reason)
        return None


def load(compiler: str | None = None) -> ctypes.CDLL:
    """Compiles them (0.5 s, once a machine and version) and loads them. Raises NoKernels.

    compiler: its command; None takes $CC, cc, gcc or clang.
    """
    if "avx512f" not in cpu.flags():
        raise NoKernels("this CPU has no AVX-512, and they are not faster without")
    command = compiler or os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if command is None:
        raise NoKernels("no C compiler (cc, gcc or clang); with one, many adapters decode faster")
    digest = hashlib.sha256("\n".join((command, *_FLAGS, *sorted(cpu.flags()))).encode())
    for name in _SOURCES:
        digest.update(_here(name).read_bytes())
    try:
        folder = build_once(cache_root() / "kernels" / digest.hexdigest()[:24], lambda into: _compile(command, into))
        return ctypes.CDLL(str(folder / "lora.so"))
    except OSError as error:
        raise NoKernels(str(error)) from error


def _compile(command: str, into: Path) -> None:
    arguments = [*command.split(), *_FLAGS, str(_here("lora.c")), "-o", str(into / "lora.so")]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=_BUILD_S)
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{command} took more than {_BUILD_S:g} s") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise NoKernels(f"{command} failed: {said}")


def _here(name: str) -> Path:
    return Path(__file__).parent / name
