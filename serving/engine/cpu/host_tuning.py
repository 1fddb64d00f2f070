"""Settings that make the engine faster on a CPU and change no result.

Heap memory is not given back, old objects are not searched for garbage, a tall output layer is computed in pieces.
"""

import ctypes
import gc
import math
import os
import sys
from collections.abc import Callable

import numpy
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES, _MAPPED_BYTES = 1 << 28, 1 << 26
_KERNEL_CACHES, _KEPT_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "128"
_PIECE = 1024
_TALL = 8 * _PIECE
_FEW_ROWS = 128


def keep_freed_memory() -> bool:
    """Tells glibc to keep up to 256 MiB of freed heap. False where there is no glibc.

    A step allocates and frees the same activations again and again; by default glibc hands them back to the system each
    time. Measured on prompts of SmolLM2-135M, one AVX2 core: 667,914 page faults and 2.2 of 16.5 CPU seconds less.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES))


def keep_few_kernels() -> None:
    """Keeps 128 compiled matrix products of 16 bits, not oneDNN's 1,024 and PyTorch's 1,024 more, unless the
    environment says otherwise; call it before the first one.

    Each number of packed tokens has kernels of its own, 0.3 MB each, and seldom comes again soon. SmolLM2-135M in
    bf16, 150 steps of 64 rows and prompts: 190 MB less, and not slower.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, _KEPT_KERNELS)


def spare_old_objects() -> bool:
    """Leaves all objects of now out of Python's searches for garbage, until `gc.unfreeze`.

    Torch, transformers and the model are some 400,000 objects that stay. A search visits them all and holds the
    interpreter meanwhile: reading one adapter of 420 tensors spent 23 of its 40 ms in them.

    Returns False, and does nothing, in a process that has already left its objects out: those stay out when the engine
    stops.
    """
    if gc.get_freeze_count():
        return False
    gc.collect()
    gc.freeze()
    return True


def new_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory of a CPU until they are written (calloc), which `torch.zeros` would."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(numpy.zeros(math.prod(shape) * dtype.itemsize, numpy.uint8)).view(dtype).view(shape)


class PiecewiseOutput:
    """Computes a tall output layer 1,024 tokens of the vocabulary at a time, while a step chooses few tokens.

    MKL packs a tall weight badly for few rows: 49,152 x 576, one core, 8 / 32 / 64 rows: 24.7 / 41.5 / 64.1 ms in one
    piece, 17.1 / 33.5 / 53.3 in pieces. Off, or with many rows, the layer runs as it is.
    """

    def __init__(self, layer: torch.nn.Module | None) -> None:
        self.on = True
        self._layer = layer if layer is not None and _fits(layer) else None
        if self._layer is not None:
            self._layer.forward = self._wrap(self._layer, self._layer.forward)

    def unhook(self) -> None:
        """Gives the layer its own forward back."""
        if self._layer is not None:
            del self._layer.forward
            self._layer = None

    def _wrap(
        self, layer: torch.nn.Module, whole: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            x_NI = x.reshape(-1, x.shape[-1])
            if not self.on or len(x_NI) > _FEW_ROWS:
                return whole(x)
            weight = layer.weight
            assert isinstance(weight, torch.Tensor), "a linear layer has a weight"
            out_NV = x.new_empty(len(x_NI), len(weight))
            for piece, out in zip(weight.split(_PIECE), out_NV.split(_PIECE, dim=1), strict=True):
                torch.mm(x_NI, piece.t(), out=out)
            return out_NV.view(*x.shape[:-1], len(weight))

        return forward


def _fits(layer: torch.nn.Module) -> bool:
    """A plain 32-bit linear on the CPU, without bias, tall enough."""
    return (
        type(layer) is torch.nn.Linear
        and layer.bias is None
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and len(layer.weight) >= _TALL
    )
