"""adapter_model.safetensors, read once: its sha256 is taken over the very bytes that become tensors.

A reader takes named tensors out of a `TensorFile` one by one; tensors that are left are rejected.

Whole, in few calls that let go of the interpreter: each smaller piece would make the engine's thread wait for it twice.

Read, not mapped: a mapped file that is truncated kills the process with SIGBUS, and one that is written to later
changes weights that were already checked. The tensors are views of one buffer; nothing is copied a second time here.
"""

import hashlib
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy
import torch

from graftwork.adapters.kind import MODULE_PREFIX
from graftwork.artifacts.verify import SAFETENSORS_ONLY, WEIGHTS_FILE, TensorInfo, header_bytes, parse_header
from graftwork.errors import ArtifactError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = 1 << 22
"""Values; what is noted of them takes a byte or two each."""
_REPUBLISH = "publish the adapter again, or take the file from a source you trust"


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, in the file's dtypes. `sha256`: hex digest that the file must have.

    Raises ArtifactError: unreadable, not safetensors, a header that the file does not bear out, another digest, inf or
    nan.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = _read_exactly(file, min(size, 9))
            head = start + _read_exactly(file, 8 + header_bytes(start, size) - len(start))
            infos = parse_header(head, size)
            dtypes = {_DTYPES[info.dtype] for info in infos.values()}
            data, digest, finite = _read(file, head, size, dtypes.pop() if len(dtypes) == 1 else None)
    except (OSError, ValueError) as error:
        raise ArtifactError(str(path), str(error), SAFETENSORS_ONLY, _REPUBLISH) from error
    _require_digest(path, sha256, digest)
    tensors = _views(data, infos, len(head))
    bad = [] if finite else [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise ArtifactError(str(path), f"inf or nan in {bad[0]} ({len(bad)} such)", "adapter weights are finite")
    return tensors


def read_bytes(path: Path, sha256: str | None = None, *, most: int) -> bytes:
    """A small file of an adapter, of at most `most` bytes, checked in the same way. Raises ArtifactError."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ArtifactError(str(path), str(error), "an adapter's files can be read", _REPUBLISH) from error
    if len(data) > most:
        raise ArtifactError(str(path), f"more than {most} bytes", f"at most {most} are read", _REPUBLISH)
    _require_digest(path, sha256, hashlib.sha256(data).hexdigest())
    return data


def _read(file: BinaryIO, head: bytes, size: int, dtype: torch.dtype | None) -> tuple[torch.Tensor, str, bool]:
    """The data, apart from the header so that it starts aligned; the file's sha256; whether all is known to be finite.

    dtype: of every tensor, if it is one.
    """
    data = torch.empty(size - len(head), dtype=torch.uint8)
    into, done = data.numpy().data, 0
    while done < len(into):
        count = file.readinto(into[done:])  # type: ignore[attr-defined]  # a raw file has it
        if not count:
            raise ValueError(f"it got shorter while it was read ({done} of {len(into)} bytes)")
        done += count
    digest = hashlib.sha256(head)
    digest.update(into)
    return data, digest.hexdigest(), dtype is not None and all_finite(data.view(dtype))


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = file.read(count - len(parts))
        if not part:
            raise ValueError(f"cut short at byte {len(parts)} of {count}")
        parts += part
    return parts


def _require_digest(path: Path, expected: str | None, digest: str) -> None:
    if expected is not None and digest != expected:
        found = f"sha256 differs from the manifest's ({digest[:12]}, expected {expected[:12]})"
        raise ArtifactError(str(path), found, "every byte is as published", _REPUBLISH)


def _views(data: torch.Tensor, infos: Mapping[str, TensorInfo], data_start: int) -> dict[str, torch.Tensor]:
    whole = {name: data.view(dtype) for name, dtype in _DTYPES.items() if len(data) % dtype.itemsize == 0}
    views = {}
    for name, info in infos.items():
        dtype, start = _DTYPES[info.dtype], info.start - data_start
        if info.dtype not in whole or start % dtype.itemsize:  # an odd number of narrower values comes before it
            views[name] = data[start : info.stop - data_start].clone().view(dtype).view(info.shape)
        else:
            strides = [math.prod(info.shape[place + 1 :]) for place in range(len(info.shape))]
            views[name] = whole[info.dtype].as_strided(info.shape, strides, start // dtype.itemsize)
    return views


def all_finite(values: torch.Tensor) -> bool:
    """True: no value is inf or nan. By NumPy: PyTorch's helpers of this thread would slow the engine's."""
    for part_N in values.reshape(-1).split(_AT_ONCE):
        if part_N.dtype == torch.bfloat16:  # NumPy has none; every bit of the exponent is set in what is not finite
            if ((part_N.view(torch.int16).numpy() & 0x7F80) == 0x7F80).any():
                return False
        elif not numpy.isfinite(part_N.numpy()).all():
            return False
    return True


class TensorFile:
    """The tensors of one adapter. `path` begins its errors."""

    def __init__(self, folder: Path, sha256: str | None = None) -> None:
        self.path = folder / WEIGHTS_FILE
        self._left = read_tensors(self.path, sha256)

    def match(self, key: re.Pattern[str]) -> list[re.Match[str]]:
        """Return the matches of unread names of PEFT's form: `key` matches the part after the prefix."""
        names = (name for name in self._left if name.startswith(MODULE_PREFIX))
        return [found for name in names if (found := key.fullmatch(name, len(MODULE_PREFIX)))]

    def holds(self, key: str) -> bool:
        """True: the tensor is there and not taken yet."""
        return key in self._left

    def take(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, keep: Collection[torch.dtype] = ()
    ) -> torch.Tensor:
        """Takes a tensor of that shape out, in `dtype` unless it has one of `keep`. Raises ArtifactError."""
        if key not in self._left:
            raise self.make_error(f"no tensor {key}", "the config asks for it")
        tensor = self._left.pop(key)
        if tuple(tensor.shape) != tuple(shape):
            rule, move = f"this base needs {list(shape)}", "serve the adapter on the base it was trained on"
            raise self.make_error(f"{key} {list(tensor.shape)}", rule, move)
        return tensor if tensor.dtype in keep else tensor.to(dtype)

    def require_empty(self, expected: str) -> None:
        """Refuses tensors that nobody took. expected: what the weights may hold."""
        if self._left:
            raise self.make_error(
                f"tensor {min(self._left)} ({len(self._left)} such)", f"the weights hold only {expected}"
            )

    def make_error(self, found: str, rule: str, hint: str = "publish the adapter again") -> ArtifactError:
        """The error for something in the file."""
        return ArtifactError(str(self.path), found, rule, hint)
