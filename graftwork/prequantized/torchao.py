"""torchao checkpoints in safetensors: int8, int4 and FP8 weights of `quantize_` (torchao 0.15 and newer).

A weight `x.weight` is stored as `x._weight_qdata`, `x._weight_scale` and `x._weight_zero_point`; the header of the file
names the class of each. Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor hold one value a byte, [O, I], with
scales [O, G]. Reference: `dequantize` of these classes in torchao 0.18. Int4Tensor holds signed values two a byte, the
first in the low bits, [O, I / 2], with scales and zeros [G, O]; torchao multiplies them on CUDA only, as
q * scale + zero.
"""

import json
from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

from graftwork.prequantized.format import PackedFormat, Parts, Settings, names, unsupported
from graftwork.prequantized.fp8 import multiply

if TYPE_CHECKING:
    import torch

PLAIN = "Tensor"
"""Class of a weight that is not quantised."""
BYTES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
"""Classes with one value a byte."""
NIBBLES = ("Int4Tensor",)
DATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


def read(settings: Settings) -> PackedFormat:
    """Return the format of this `quantization_config`. Raises BaseModelError."""
    given = settings.get("quant_type")
    kind = _find(given, "_type") or (given if isinstance(given, str) else "")
    nibbles = kind in ("Int4WeightOnlyConfig", "int4_weight_only")
    columns, float8 = int(_find(given, "group_size") or 0), "Float8" in kind
    if nibbles and not columns:
        columns = 128  # torchao's default
    classes = NIBBLES if nibbles else BYTES

    def packed_bytes(inputs: int, outputs: int) -> int:
        groups = outputs * (ceil(inputs / columns) if columns else 1)
        scale, zero = (2, 2) if nibbles else (2, 1) if columns else (4, 0 if float8 else 1)
        return inputs * outputs // (2 if nibbles else 1) + groups * (scale + zero)

    def check(header: Mapping[str, str]) -> None:
        for name in json.loads(header.get("tensor_names", "[]")):
            found = json.loads(header[name]).get("_type")
            if found not in (PLAIN, *classes):
                rule = f"classes that are read with {kind or 'this quant_type'}: {', '.join(classes)}"
                raise unsupported("quant_type", f"{name} is a {found}", rule)

    return PackedFormat(
        label=f"torchao {kind or 'weights'}" + (f" (groups of {columns})" if columns else " (a scale per row)"),
        parts=(DATA, SCALE, ZERO),
        marks=(DATA,),
        dequantise=_nibbles if nibbles else _bytes,
        packed_bytes=packed_bytes,
        plain=(*names(settings, "modules_to_not_convert"), "lm_head"),
        check_file=check,
    )


def _find(value: Any, key: str) -> Any:
    """Return the first value of a key in nested JSON objects, breadth first; None where there is none."""
    level = [value]
    while level:
        objects = [one for one in level if isinstance(one, Mapping)]
        if found := next((one[key] for one in objects if one.get(key) is not None), None):
            return found
        level = [inner for one in objects for inner in one.values()]
    return None


def _bytes(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
    """Return (q - zero) * scale, [O, I]: in the scale's dtype, or in `dtype` times a scale in fp32."""
    import torch

    q_OI, scale, zero = parts[DATA], parts[SCALE], parts.get(ZERO)
    if q_OI.dtype != torch.int8:
        return multiply(q_OI, scale, dtype)
    wide = dtype if scale.dtype == torch.float32 else scale.dtype
    scale_OG = scale.reshape(q_OI.shape[0], -1) if scale.numel() > 1 else scale.reshape(1, 1)
    q_OGn: torch.Tensor = q_OI.to(wide).unflatten(1, (scale_OG.shape[1], -1))
    if zero is not None:
        q_OGn = q_OGn - zero.reshape(scale_OG.shape).to(wide).unsqueeze(-1)
    return (q_OGn * scale_OG.unsqueeze(-1)).flatten(1).to(wide).to(dtype)


def _nibbles(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
    """Return q * scale + zero in fp32, then in `dtype`, [O, I]."""
    import torch

    packed = parts[DATA].view(torch.uint8)
    q_OI = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1).to(torch.int8)
    signed_OI = torch.where(q_OI > 7, q_OI - 16, q_OI).float()
    columns = signed_OI.shape[1] // parts[SCALE].shape[0]
    scale_OI, zero_OI = (parts[part].t().float().repeat_interleave(columns, 1) for part in (SCALE, ZERO))
    return (signed_OI * scale_OI + zero_OI).to(dtype)
