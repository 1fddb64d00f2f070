"""A frozen LoRA below the one that is trained: part of the base for the loop, and summed with the other in the end."""

from pathlib import Path
from typing import Any

import torch

from graftwork.training.adapters.merge import MergeSource, merge
from graftwork.training.adapters.merge_spec import MergeSpec


def attach_frozen_adapter(model: Any, folder: Path) -> None:
    """Let each linear of a loaded base add the published LoRA's delta, in fp32, before any adapter is attached.

    By hooks: the weights are in no state dict, so no checkpoint copies them, and a quantised base stays as it is.
    `adapter_disabled` leaves it on: what training began from is the base with it.
    """
    lora = MergeSource.read("base_adapter", folder)
    for name, module in model.named_modules():
        sides = lora.sides(name)
        if sides is not None:
            device = next(module.parameters()).device
            module.register_forward_hook(_adds(sides[1].to(device), sides[0].to(device) * lora.scale))


def sum_of(trained: Path, below: Path, out: Path) -> int:
    """Write the trained adapter and the one below as one to folder `out`; its rank. The deltas are added exactly."""
    both = [MergeSource.read("the trained adapter", trained), MergeSource.read("base_adapter", below)]
    rank, _ = merge(both, MergeSpec("cat", (1.0, 1.0)), out)
    return rank


def _adds(a_RI: torch.Tensor, b_OR: torch.Tensor) -> Any:
    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        delta = torch.nn.functional.linear(torch.nn.functional.linear(inputs[0].float(), a_RI), b_OR)
        return result + delta.to(result.dtype)

    return hook
