"""An adapter's weights file, read once: its sha256 is taken over the very bytes that become tensors.

Read, not mapped: a mapped file that somebody cuts short kills the process with SIGBUS, and one that is written to later
changes weights that were already checked. The tensors are views of one buffer; nothing is copied a second time here.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from graftwork.artifact_check import SAFETENSORS_ONLY, TensorInfo, header_bytes, parse_header
from graftwork.errors import ArtifactError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_REPUBLISH = "publish the adapter again, or take the file from a source you trust"


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, in the file's dtypes. `sha256`: hex digest that the file must have.

    Raises ArtifactError: unreadable, not safetensors, a header that the file does not bear out, another digest, inf or
    nan.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            head, data = _read(file, os.fstat(file.fileno()).st_size)
        infos = parse_header(head, len(head) + len(data))
    except (OSError, ValueError) as error:
        raise ArtifactError(str(path), str(error), SAFETENSORS_ONLY, _REPUBLISH) from error
    if sha256 is not None:
        _require_digest(path, sha256, head, data)
    tensors = {name: _view(data, info, len(head)) for name, info in infos.items()}
    _require_finite(path, data, tensors)
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
    if sha256 is not None:
        _require_digest(path, sha256, data)
    return data


def _read(file: BinaryIO, size: int) -> tuple[bytes, torch.Tensor]:
    """Header and data apart, so that the data starts aligned. Allocates what the file has, not what it claims."""
    start = _exactly(file, min(size, 9))
    head = start + _exactly(file, 8 + header_bytes(start, size) - len(start))
    data = torch.empty(size - len(head), dtype=torch.uint8)
    into, done = data.numpy().data, 0
    while done < len(into):
        count = file.readinto(into[done:])  # type: ignore[attr-defined]  # a raw file has it
        if not count:
            raise ValueError(f"it got shorter while it was read ({done} of {len(into)} bytes)")
        done += count
    return head, data


def _exactly(file: BinaryIO, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = file.read(count - len(parts))
        if not part:
            raise ValueError(f"cut short at byte {len(parts)} of {count}")
        parts += part
    return parts


def _require_digest(path: Path, expected: str, *parts: bytes | torch.Tensor) -> None:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().data if isinstance(part, torch.Tensor) else part)
    if digest.hexdigest() != expected:
        found = f"sha256 differs from the manifest's ({digest.hexdigest()[:12]}, expected {expected[:12]})"
        raise ArtifactError(str(path), found, "every byte is as published", _REPUBLISH)


def _view(data: torch.Tensor, info: TensorInfo, data_start: int) -> torch.Tensor:
    dtype, start = _DTYPES[info.dtype], info.start - data_start
    if start % dtype.itemsize or len(data) % dtype.itemsize:  # an odd number of narrower values stands beside it
        return data[start : info.stop - data_start].clone().view(dtype).view(info.shape)
    strides = [math.prod(info.shape[place + 1 :]) for place in range(len(info.shape))]
    return data.view(dtype).as_strided(info.shape, strides, start // dtype.itemsize)


def _require_finite(path: Path, data: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1 and all_finite(data.view(dtypes.pop())):  # one pass over the buffer, not 420 over its parts
        return
    bad = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise ArtifactError(str(path), f"inf or nan in {bad[0]} ({len(bad)} such)", "adapter weights are finite")


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is inf or nan. A finite sum proves it in one cheap pass; an overflowing one proves nothing."""
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())
