"""Bytes of a checkpoint's files: their sums, what differs from them, and weights that no checkpoint may hold."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.storage_local import files_under

_BLOCK = 2**20
Shapes = Counter[tuple[int, ...]]
"""How often a checkpoint holds a tensor of each shape."""


@dataclass(frozen=True)
class FileSum:
    """A file's content, as the marker records it."""

    size_bytes: int
    sha256: str


def sums_of(folder: Path) -> dict[str, FileSum]:
    """Every file below a folder, by its path there; all are on the disk, not only in its cache, when it returns."""
    return {"/".join(parts): sum_of(folder.joinpath(*parts), sync=True) for parts in files_under(folder)}


def sum_of(path: Path, *, sync: bool = False) -> FileSum:
    """Size and sha256, read in blocks (which lets other threads compute)."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileSum(size, digest.hexdigest())


def differences(folder: Path, files: Mapping[str, FileSum]) -> list[str]:
    """What is missing or other than recorded, a phrase a file."""
    found = []
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected.size_bytes:
            found.append(f"{name} has {path.stat().st_size} bytes of {expected.size_bytes}")
        elif sum_of(path) != expected:
            found.append(f"{name} has another sha256")
    return found


def shapes_of(model: Any) -> Shapes:
    """Shapes of all trained tensors: whole ones, also where a strategy shards them."""
    return Counter(tuple(getattr(p, "ds_shape", p.shape)) for p in model.parameters() if p.requires_grad)


def faults_of_weights(folder: Path, trained: Shapes) -> list[str]:
    """Why the saved weights are not those of a model in training: too few, of other shapes, not finite, all zero."""
    import torch
    from safetensors import safe_open

    shapes: Shapes = Counter()
    nonzero, faults = False, []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping: it can't be iterated over
                tensor = tensors.get_tensor(name)
                shapes[tuple(tensor.shape)] += 1
                nonzero = nonzero or bool(tensor.any())
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    faults.append(f"{name} is not finite")
    lacking = trained - shapes
    if lacking:
        shape, count = next(iter(lacking.items()))
        faults.append(f"{lacking.total()} of {trained.total()} trained tensors lack, {count} of shape {shape} for one")
    if not nonzero:
        faults.append("every number is 0")
    return faults
