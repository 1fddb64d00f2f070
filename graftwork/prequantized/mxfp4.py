"""MXFP4 checkpoints of gpt-oss: experts in 4-bit floats with one power of two for 32 values.

OCP Microscaling Formats 1.0: a value is E2M1, a scale E8M0 (2^(byte - 127)). `*_blocks` [E, O, G, 16] holds two values
a byte, the first in the low bits; `*_scales` [E, O, G]. Reference: `convert_moe_packed_tensors` of transformers 5.24,
which gives [E, I, O] as the experts of gpt-oss multiply. Each value is exact in bf16.
"""

from typing import TYPE_CHECKING

from graftwork.prequantized.format import PackedFormat, Parts, Settings, names

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the three low bits; the fourth is the sign."""
BIAS = 127
PER_SCALE = 32


def read(settings: Settings) -> PackedFormat:
    """Return the format of this `quantization_config`."""
    return PackedFormat(
        label="MXFP4 (experts, groups of 32)",
        parts=("blocks", "scales"),
        marks=("blocks",),
        dequantise=dequantise,
        packed_bytes=lambda inputs, outputs: inputs * outputs // 2 + inputs * outputs // PER_SCALE,
        plain=names(settings, "modules_to_not_convert"),
        joint="_",
        of_linears=False,
    )


def dequantise(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
    """Return the values of all experts, [E, I, O]."""
    import torch

    blocks, scales = parts["blocks"], parts["scales"]
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=dtype, device=blocks.device)
    codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2).int()  # [E, O, G, 32]
    exponents = (scales.int() - BIAS).unsqueeze(-1)
    return torch.ldexp(table[codes], exponents).flatten(-2).transpose(-1, -2).contiguous().to(dtype)
