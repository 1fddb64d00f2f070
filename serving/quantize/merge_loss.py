"""What merging an adapter into 4-bit weights would lose, measured on the adapter at hand.

A merged weight has to be quantised again: 64 neighbours share one scale and 16 levels, and a delta is mostly smaller
than half the step between two levels, so most weights round back to where they were. Kept beside the base, nothing of
the delta is lost; that is how every adapter is served.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from graftwork.base_model import QuantSpec


def merge_loss(model: Any, quant: QuantSpec, adapter: Path) -> float | None:
    """||requantised(W + delta) - (W + delta)|| / ||delta|| over all LoRA targets: 0 keeps the delta, 1 loses its size.

    model: a base loaded at `quant` (nf4) before its first forward pass; given back as it was. W is the base's weight as
    served. None for an adapter without LoRA deltas. Source of the delta: PEFT's `get_delta_weight`.
    """
    from peft import PeftModel

    assert quant.kind == "nf4", "only 4-bit weights are requantised by a merge"
    wrapped = PeftModel.from_pretrained(model, adapter)
    try:
        lost = kept = 0.0
        for weight_OI, delta_OI in _targets(wrapped):
            merged_OI = weight_OI + delta_OI
            lost += float((requantised(merged_OI, double=quant.double_quant) - merged_OI).norm()) ** 2
            kept += float(delta_OI.norm()) ** 2
    finally:
        assert wrapped.unload() is model, "the base itself is given back"
    return math.sqrt(lost / kept) if kept else None


def requantised(weight_OI: torch.Tensor, *, double: bool) -> torch.Tensor:
    """The weight's values after nf4 as `base_model.load` makes it: blocks of 64."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight_OI, quant_type="nf4", compress_statistics=double)
    plain_OI: torch.Tensor = dequantize_4bit(packed, state)
    return plain_OI


def _targets(wrapped: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(weight as served, delta) of each adapted linear, fp32."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.layer import LoraLayer

    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and module.active_adapters[0] in module.lora_A:
            weight = module.get_base_layer().weight
            state = getattr(weight, "quant_state", None)
            plain = weight.data if state is None else dequantize_4bit(weight.data, state)
            yield plain.float(), module.get_delta_weight(module.active_adapters[0]).float()
