"""FP8 checkpoints: 8-bit floats with one scale a block, a row or a tensor (`quant_method` fp8 and fbgemm_fp8).

The layout is that of DeepSeek-V3 (arXiv 2412.19437, section 3.3): `weight` in float8_e4m3fn and `weight_scale_inv`,
which is multiplied in spite of its name, for blocks of 128 x 128. Checkpoints with one scale a tensor or row name it
`weight_scale`. Reference: `Fp8Dequantize` of transformers 5.24, which multiplies in fp32 and rounds once.
"""

from math import ceil
from typing import TYPE_CHECKING

from graftwork.prequantized.format import IGNORED, PackedFormat, Parts, Settings, names, unsupported

if TYPE_CHECKING:
    import torch

FP32 = 4
E4M3_MAX = 448.0
CHUNK_ROWS = 64
"""Rows that are computed at once on a CPU, so that they stay in its caches."""
UE8M0_BIAS = 127
"""Of a scale that is stored as its exponent in one byte."""


def read(settings: Settings) -> PackedFormat:
    """Return the format of this `quantization_config`. Raises BaseModelError."""
    block = settings.get("weight_block_size")
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise unsupported("weight_block_size", repr(block), "a block has a number of rows and one of columns")
    if settings.get("fmt", "e4m3") != "e4m3":
        raise unsupported("fmt", repr(settings["fmt"]), "weights are read in the format e4m3")
    rows, columns = (int(size) for size in block) if block else (0, 0)

    by_row = settings.get("quant_method") == "fbgemm_fp8"

    def packed_bytes(inputs: int, outputs: int) -> int:
        scales = ceil(outputs / rows) * ceil(inputs / columns) if block else outputs if by_row else 1
        return inputs * outputs + scales * FP32

    def dequantise(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
        if parts["weight"].element_size() != 1:
            raise ValueError(f"weight is stored as {parts['weight'].dtype}")
        scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
        return multiply(parts["weight"], scale, dtype, (rows, columns) if block else None)

    return PackedFormat(
        label=f"FP8 (blocks of {rows}x{columns})" if block else f"FP8 (a scale per {'row' if by_row else 'tensor'})",
        parts=("weight", "weight_scale_inv", "weight_scale", *IGNORED),
        marks=("weight_scale_inv", "weight_scale"),
        dequantise=dequantise,
        packed_bytes=packed_bytes,
        plain=names(settings, "modules_to_not_convert", "ignored_layers"),
    )


def multiply(
    weight_OI: "torch.Tensor", scale: "torch.Tensor", dtype: "torch.dtype", block: tuple[int, int] | None = None
) -> "torch.Tensor":
    """Return weight * scale, multiplied in fp32 and rounded to `dtype`.

    The scale is one value, [O], [O, 1], or a grid of blocks whose last are cut off. Without `block` the grid divides
    the weight evenly.
    """
    import torch

    exponents = scale.dtype == torch.uint8
    wide = torch.exp2(scale.float() - UE8M0_BIAS) if exponents else scale.float()
    wide = wide.reshape(1, 1) if wide.numel() == 1 else wide[:, None] if wide.dim() == 1 else wide
    outputs, inputs = weight_OI.shape
    one_value = wide.numel() == 1
    rows, columns = block if block and not one_value else (outputs // wide.shape[0], inputs // wide.shape[1])
    if (ceil(outputs / rows), ceil(inputs / columns)) != tuple(wide.shape):
        found = f"{outputs}x{inputs} weights with a grid of {wide.shape[0]}x{wide.shape[1]} scales"
        raise unsupported("weight_block_size", found, f"a scale belongs to {rows}x{columns} weights")
    out_OI = torch.empty(outputs, inputs, dtype=dtype, device=weight_OI.device)
    step = CHUNK_ROWS if weight_OI.device.type == "cpu" else outputs
    for first in range(0, outputs, step):
        part_NI = _widen(weight_OI[first : first + step])
        scale_N = torch.arange(first, first + len(part_NI), device=wide.device) // rows
        if inputs % columns:
            part_NI *= wide[scale_N].repeat_interleave(columns, 1)[:, :inputs]
        else:
            part_NI.unflatten(1, (-1, columns)).mul_(wide[scale_N].unsqueeze(-1))
        out_OI[first : first + step] = part_NI
    return out_OI


def _widen(weight: "torch.Tensor") -> "torch.Tensor":
    """Return the values in fp32. On a CPU by way of fp16, whose bits e4m3 has but for the bias of its exponent.

    PyTorch 2.13 converts value by value there: 50 to 90 million a second, with this `multiply` does 160 to 490.
    """
    import torch

    if weight.device.type != "cpu" or weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    bits = weight.view(torch.int8).to(torch.int16)
    half = (bits << 7).bitwise_and_(0x3F80).bitwise_or_(bits.bitwise_and_(-0x8000))
    wide = half.view(torch.float16).float().mul_(2.0**8)
    low, high = wide.aminmax()
    return weight.float() if max(-float(low), float(high)) > E4M3_MAX else wide  # 480: the bits of NaN
