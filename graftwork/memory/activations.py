"""Bytes that a token leaves for the backward pass, counted from the autograd graphs of transformers and PEFT.

Equal to what `torch.autograd.graph.saved_tensors_hooks` sees (tests/unit/test_memory.py).
"""

from graftwork.memory.sizes import BF16, FP32
from graftwork.memory.weights import places
from graftwork.model_shape import ModelShape
from graftwork.training.adapter_spec import AdapterSpec, BottleneckSpec, FullSpec, Ia3Spec, LoraSpec, PrefixSpec


def saved_bytes(
    model: ModelShape,
    adapter: AdapterSpec,
    padded_to: int | None = None,
    *,
    value_bytes: int = FP32,
    autocast: bool = False,
    mask_bytes: int = FP32,
) -> float:
    """Bytes that one token leaves in one block, `adapter` attached and the rest frozen, without checkpointing.

    `padded_to`: tokens of a row in a batch with padding, which repeats keys and values to the query heads
    (transformers' `use_gqa_in_sdpa`) and keeps a mask a block; None for rows of one length. The adapter is in fp32 in
    any case: beside a base of 16 bits each of its targets keeps its own input once more, in fp32 or, under autocast (as
    on a GPU), in 16 bits. `mask_bytes`: of a value of dropout's mask, 4 on a CPU and 1 on a GPU.
    """
    kv, row = model.kv_size if padded_to is None else model.q_size, padded_to or 0
    stretch = 1.0
    if isinstance(adapter, PrefixSpec) and padded_to:  # it always brings a mask; keys and values are longer by it
        row = padded_to + adapter.tokens
        stretch = row / padded_to
    mlp = (3 if model.gated else 1) * model.intermediate  # gate, silu(gate), up; or the activation's input
    computed = 2 * model.q_size + 2 * kv * stretch + row + mlp  # q, k, v, the attention's output, the mask
    norms = 2 * (model.hidden + 1)  # the input of each RMSNorm and its 1/rms, in fp32
    frame = computed * value_bytes + (norms + model.heads) * FP32
    return frame + _of_adapter(model, adapter, BF16 if autocast else FP32, value_bytes, mask_bytes)


def _of_adapter(model: ModelShape, adapter: AdapterSpec, computed: int, value_bytes: int, mask_bytes: int) -> float:
    """What the adapter keeps beside the frozen block. `computed`: bytes of a value that its own products see."""
    h, i = model.hidden, model.intermediate
    match adapter:
        case LoraSpec():
            return _of_lora(model, adapter, computed, value_bytes, mask_bytes)
        case FullSpec() if computed == FP32:  # the normed inputs, q's, gate's and down's; o's is the attention's
            return 4 * h * FP32 + i * computed
        case FullSpec():  # under autocast each linear keeps its own input in 16 bits
            return 2 * h * FP32 + (5 * h + i) * computed
        case Ia3Spec():  # keys and values before they are scaled, the input of down in fp32
            return 2 * model.kv_size * value_bytes + i * FP32
        case PrefixSpec():
            return 0
        case BottleneckSpec():  # its input, the hidden layer before and after the activation
            return places(adapter) * (h + 2 * adapter.size) * computed


def _of_lora(model: ModelShape, adapter: LoraSpec, computed: int, value_bytes: int, mask_bytes: int) -> float:
    targets = model.targets(adapter.targets)
    inputs = sum(linear.count * linear.inputs for linear in targets) / model.layers
    kept = sum(linear.count for linear in targets) / model.layers * adapter.rank * computed
    if adapter.dropout > 0 or value_bytes != FP32:  # each target keeps its own input
        kept += inputs * computed
    else:  # inputs of A: q, k and v share one, gate and up share one; o's is the attention output, counted in the frame
        kept += model.read(adapter.targets) * FP32
    if adapter.dropout > 0:
        kept += inputs * mask_bytes
    if adapter.dora:  # the base's output and the update's, to train the magnitude by
        kept += sum(linear.count * linear.outputs for linear in targets) / model.layers * (value_bytes + computed)
    return kept
