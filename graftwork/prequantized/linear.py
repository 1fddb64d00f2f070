"""Linear layer whose frozen weight stays packed as in its checkpoint: each pass computes the exact values from it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from graftwork.prequantized.format import PackedFormat

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
"""Held as bytes in memory: communication between ranks has no such types, and a cast of the model would change them."""


class PackedLinear(nn.Linear):
    """y = x W^T + b with W [O, I] computed from its parts in each forward and each backward pass, in `dtype`.

    The parts are parameters without a gradient: DDP sends buffers to all ranks in each pass. A gradient goes to the
    input alone.
    """

    def __init__(
        self,
        parts: Mapping[str, torch.Tensor],
        packed: PackedFormat,
        size: tuple[int, int],
        dtype: torch.dtype,
        bias: torch.Tensor | None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a plain weight
        self.in_features, self.out_features = size
        self.packed_format, self.dtype = packed, dtype
        self.part_types = {name: part.dtype for name, part in parts.items()}
        for name, part in parts.items():
            stored = part.detach().contiguous()
            held = stored.view(torch.uint8) if stored.dtype in FLOAT8 else stored
            self.register_parameter(_attribute(name), nn.Parameter(held, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The exact values [O, I], computed at each use."""
        parts: dict[str, torch.Tensor] = {name: getattr(self, _attribute(name)).data for name in self.part_types}
        for name, stored in self.part_types.items():
            if stored in FLOAT8:
                parts[name] = parts[name].view(stored)
        with torch.no_grad():
            return self.packed_format.dequantise(parts, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (the name in nn.Linear)
        """Return x W^T + b; [..., I] to [..., O]."""
        if torch.is_grad_enabled() and input.requires_grad:
            out: torch.Tensor = _PackedProduct.apply(input, self)  # type: ignore[no-untyped-call]
            return out
        return linear(input, self.weight, self.bias)


class _PackedProduct(torch.autograd.Function):
    """The product of `PackedLinear`; the plain weight lives during one product, not until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        """Return x W^T + b."""
        ctx.layer = layer
        return linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of x."""
        (grad,) = grads
        return grad @ ctx.layer.weight.to(grad.dtype), None


def _attribute(part: str) -> str:
    return f"packed_{part.lstrip('_')}"
