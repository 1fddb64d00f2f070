"""The base's norms and gated MLPs while decoding: one kernel each instead of many.

They are known by what they compute, not by name: a module takes part if its own result on random rows equals the
formula bit for bit. Outside of `decoding` every module is as it was. Legend: N rows, H hidden, I intermediate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch.nn.functional import silu

_PROBE_ROWS = 2


class RowKernels(Protocol):
    """The kernels of a device. Inputs are contiguous."""

    def rms_norm(self, x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, /) -> torch.Tensor:
        """`weight * (x / sqrt(mean(x * x) + eps))` of each row, the quotient rounded to x's dtype first."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor, /) -> torch.Tensor:
        """`silu(gate) * up`, of equal shapes [..., I]."""


class DecodeLayers:
    """The modules of one model that take part. dtype: of its tokens."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, kernels: RowKernels) -> None:
        self._kernels = kernels
        self.norms = [module for module in model.modules() if _is_rms_norm(module, dtype)]
        self.mlps = [module for module in model.modules() if _is_gated_mlp(module, dtype)]

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it, the modules use the kernels."""
        try:
            for module in self.norms:
                module.forward = partial(_norm, self._kernels, module)
            for module in self.mlps:
                module.forward = partial(_mlp, self._kernels, module)
            yield
        finally:
            for module in (*self.norms, *self.mlps):
                module.__dict__.pop("forward", None)


def _norm(kernels: RowKernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    return kernels.rms_norm(x.reshape(-1, x.shape[-1]), module.weight, module.variance_epsilon).view(x.shape)


def _mlp(kernels: RowKernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.down_proj(kernels.gated(module.gate_proj(x), module.up_proj(x)))
    return result


@torch.inference_mode()
def _is_rms_norm(module: Any, dtype: torch.dtype) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(eps, float) or not isinstance(weight, torch.Tensor) or "forward" in module.__dict__:
        return False
    if weight.dim() != 1 or weight.dtype != dtype:
        return False
    if not _takes_one(module):
        return False
    for x_NH in _probes(len(weight), weight.device, dtype):
        wide_NH = x_NH.float()
        scaled_NH = wide_NH * torch.rsqrt(wide_NH.pow(2).mean(-1, keepdim=True) + eps)
        if not torch.equal(module(x_NH), weight * scaled_NH.to(dtype)):
            return False
    return True


@torch.inference_mode()
def _is_gated_mlp(module: Any, dtype: torch.dtype) -> bool:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    if "forward" in module.__dict__ or not isinstance(module.gate_proj, torch.nn.Linear) or not _takes_one(module):
        return False
    return all(
        torch.equal(module(x_NH), module.down_proj(silu(module.gate_proj(x_NH)) * module.up_proj(x_NH)))
        for x_NH in _probes(module.gate_proj.in_features, module.gate_proj.weight.device, dtype)
    )


def _takes_one(module: Any) -> bool:
    """Whether a module is called with its input alone: a gated norm has another argument."""
    return len(signature(type(module).forward).parameters) == 2


def _probes(size: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Usual values, and large ones, for which a module that clamps them differs from the formula."""
    x_NH = torch.randn(_PROBE_ROWS, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return [x_NH, 1e3 * x_NH]
