"""Products and rounding that mean the same compiled and in Triton's interpreter.

The interpreter (triton 3.9, runtime/interpreter.py) keeps bfloat16 as bare 16-bit words: its `dot` multiplies the words
as integers and its casts cut bits off instead of rounding. Compiled, both functions are the plain operations.
"""

from collections.abc import Callable
from typing import Any

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
