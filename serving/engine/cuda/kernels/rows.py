"""What stands between a decoder's linears, one kernel each: RMS norm and the gated activation.

transformers computes them in 8 and 2 kernels, which for few rows are all launching: the 65 norms of a 32-layer Llama
are 65 kernels here and 520 there. Rounded where torch rounds.
Legend: N tokens, H hidden, F inner features.
"""

import torch
import triton
import triton.language as tl

from graftwork.serving.engine.cuda.kernels.exact import rounded

_BLOCK_F = 1024


def rms_norm(x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), the quotient rounded to x's dtype first."""
    count, size = x_NH.shape
    out_NH = torch.empty(count, size, dtype=x_NH.dtype, device=x_NH.device)
    _norm_kernel[(count,)](x_NH, weight_H, out_NH, x_NH.stride(0), size, eps, BLOCK_H=triton.next_power_of_2(size))
    return out_NH


def gated(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. Both are contiguous."""
    out_NF = torch.empty_like(gate_NF)
    _gated_kernel[(triton.cdiv(gate_NF.numel(), _BLOCK_F),)](gate_NF, up_NF, out_NF, gate_NF.numel(), BLOCK_F=_BLOCK_F)
    return out_NF


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, size, eps, BLOCK_H: tl.constexpr):
    row, h_H = tl.program_id(0), tl.arange(0, BLOCK_H)
    in_H = h_H < size
    dtype = out_ptr.dtype.element_ty
    x_H = tl.load(x_ptr + row * x_stride + h_H, in_H, other=0.0).to(tl.float32)
    scaled_H = rounded(x_H * tl.rsqrt(tl.sum(x_H * x_H, axis=0) / size + eps), dtype).to(tl.float32)
    weight_H = tl.load(weight_ptr + h_H, in_H, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + h_H, rounded(weight_H * scaled_H, dtype), in_H)


@triton.jit
def _gated_kernel(gate_ptr, up_ptr, out_ptr, total, BLOCK_F: tl.constexpr):
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_F = f_F < total
    dtype = out_ptr.dtype.element_ty
    gate_F = tl.load(gate_ptr + f_F, in_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + f_F, in_F, other=0.0).to(tl.float32)
    active_F = rounded(gate_F / (1.0 + tl.exp(-gate_F)), dtype).to(tl.float32)
    tl.store(out_ptr + f_F, rounded(active_F * up_F, dtype), in_F)
