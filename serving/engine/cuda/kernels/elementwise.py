"""Operations between a decoder's linears, one kernel each: RMS norm and the gated activation.

transformers computes them in 8 and 2 kernels, which for few rows are all launching: the 65 norms of a 32-layer Llama
are 65 kernels here and 520 there. Rounded where torch rounds.

Products and rounding mean the same compiled and in Triton's interpreter (triton 3.9, runtime/interpreter.py), which
stores bfloat16 as bare 16-bit words: its `dot` multiplies the words as integers and its casts cut bits off instead of
rounding. Compiled, both functions are the plain operations.
Legend: N tokens, H hidden, F inner features.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function for kernels to call. The interpreter takes 1.2 ms to enter a compiled one and none for a plain one."""
    compiled: Callable[..., Any] = function if INTERPRETED.value else triton.jit(function)
    return compiled


@inlined
def dot(a, b, total):
    """a @ b + total, summed in float32; float32 operands are not cut to tf32."""
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        result = tl.dot(a, b, total, input_precision="ieee")
    return result


@inlined
def cdiv(a, b):
    """a / b, up to the next whole number."""
    return (a + b - 1) // b


@inlined
def rounded(x, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest, ties to even, as torch rounds."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        word = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


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
