"""bitsandbytes checkpoints: nf4, fp4 and int8 weights that `save_pretrained` wrote.

4 bits: `weight` with `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`, and `nested_*` under
double quantisation. 8 bits: `weight` and `SCB`, the largest value of each row. Reference: bitsandbytes 0.50, whose own
functions compute the values here.
"""

from typing import TYPE_CHECKING

from graftwork.prequantized.format import PackedFormat, Parts, Settings, names

if TYPE_CHECKING:
    import torch

FP32, BLOCK = 4, 64
STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
NESTED = tuple(f"weight.nested_{name}" for name in ("absmax", "quant_map"))


def read(settings: Settings) -> PackedFormat:
    """Return the format of this `quantization_config`."""
    four = bool(settings.get("load_in_4bit"))
    double = four and bool(settings.get("bnb_4bit_use_double_quant"))

    def packed_bytes(inputs: int, outputs: int) -> int:
        weights = inputs * outputs
        if not four:
            return weights + outputs * FP32
        return round(weights * (0.5 + ((1 + FP32 / 256) if double else FP32) / BLOCK))

    kind = f"{settings.get('bnb_4bit_quant_type', 'fp4')}{' with double quantisation' if double else ''}"
    eight_bits = ("weight", "SCB", "weight_format")
    return PackedFormat(
        label=f"bitsandbytes {kind if four else 'int8'}",
        parts=("weight", "weight.absmax", "weight.quant_map", *NESTED, *STATES) if four else eight_bits,
        marks=STATES if four else ("SCB",),
        dequantise=_four_bits if four else _eight_bits,
        packed_bytes=packed_bytes,
        plain=(*names(settings, "llm_int8_skip_modules"), "lm_head"),
        native=four,
    )


def _four_bits(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
    """Return the values in `dtype`, [O, I], as transformers sets it for a model that it loads in that dtype."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed = parts["weight"]
    state = QuantState.from_dict({name: part for name, part in parts.items() if name != "weight"}, packed.device)
    state.dtype = dtype
    values: torch.Tensor = dequantize_4bit(packed, state)
    return values


def _eight_bits(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
    """Return the values in fp32, then in `dtype`, [O, I]."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    values: torch.Tensor = int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    return values.to(dtype)
