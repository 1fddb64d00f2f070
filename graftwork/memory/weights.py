"""Bytes of weights, of what is trained of them, and of keys and values."""

from graftwork.adapter_places import ATTENTION_ENDS, KEYS, MLP_ENDS, VALUES
from graftwork.base_model import QuantSpec
from graftwork.memory.sizes import FP32
from graftwork.model_shape import ModelShape
from graftwork.training.adapter_spec import AdapterSpec, BottleneckSpec, FullSpec, Ia3Spec, LoraSpec, PrefixSpec

NF4_BLOCK = 64
"""Weights that share one scale in bitsandbytes' nf4."""
NF4_SCALE_BLOCK = 256
"""Scales that share one fp32 scale of their own under double quantisation."""


def weight_bytes(model: ModelShape, quant: QuantSpec, value_bytes: int = FP32, *, dequantised: bool = False) -> int:
    """Bytes of the resident base. `value_bytes`: 4 for fp32, 2 for bf16 and fp16.

    nf4 is half a byte a weight and one fp32 scale per 64 (QLoRA, arXiv 2305.14314); with double quantisation the scale
    is one byte and shares an fp32 scale with 255 others: 0.5159 bytes a weight, as counted on bitsandbytes 0.50.
    int8 is one byte a weight and one fp32 scale a row.
    """
    plain = model.plain_params * value_bytes
    if quant.kind == "none" or dequantised:
        return plain + model.linear_params * value_bytes
    if quant.kind == "int8":
        return plain + model.linear_params + model.linear_outputs * FP32
    scale = (1 + FP32 / NF4_SCALE_BLOCK) if quant.double_quant else FP32
    return plain + round(model.linear_params * (0.5 + scale / NF4_BLOCK))


def loading_bytes(model: ModelShape, quant: QuantSpec) -> dict[str, int]:
    """Beside the resident base while it is quantised: the pages of the checkpoint's file that were read."""
    return {} if quant.kind == "none" else {"checkpoint file": model.params * model.file_bytes}


def largest_linear(model: ModelShape) -> int:
    """Weights of the largest linear: what is unpacked at once of a quantised base."""
    return max(linear.params for linear in model.linears)


def kv_bytes(model: ModelShape, tokens: int, value_bytes: int = FP32) -> int:
    """Keys and values of `tokens` positions in all blocks."""
    return model.kv_values * tokens * value_bytes


def full_training_bytes(model: ModelShape, value_bytes: int = 2) -> int:
    """Weights, gradients and Adam's two fp32 moments when all weights are trained; activations come on top."""
    return model.params * (2 * value_bytes + 2 * FP32)


def trained_params(model: ModelShape, adapter: AdapterSpec) -> int:
    """How many values are trained: what gradients and the optimizer are kept for."""
    match adapter:
        case LoraSpec():
            magnitudes = sum(linear.count * linear.outputs for linear in model.targets(adapter.targets))
            return model.adapter_params(adapter.rank, adapter.targets) + magnitudes * adapter.dora
        case FullSpec():
            return model.params
        case Ia3Spec():  # scales of keys and values, and of the input of the MLP's last linear
            sides = sum(linear.count * linear.outputs for linear in model.match_layers((*KEYS, *VALUES)))
            return sides + sum(linear.count * linear.inputs for linear in model.match_layers(MLP_ENDS))
        case PrefixSpec():
            return model.layers * 2 * model.kv_size * adapter.tokens
        case BottleneckSpec():  # down and up with their biases
            ends = MLP_ENDS if adapter.placement == "pfeiffer" else (*MLP_ENDS, *ATTENTION_ENDS)
            widths = ((linear.count, linear.outputs) for linear in model.match_layers(ends))
            return sum(count * (2 * width * adapter.size + adapter.size + width) for count, width in widths)


def places(adapter: BottleneckSpec) -> int:
    """Networks in one block."""
    return 2 if adapter.placement == "houlsby" else 1
