"""Experts in 4 bits: bitsandbytes packs the parameters of fused experts, which are no linear layers.

bitsandbytes 0.50 puts a parametrization on a parameter (`bitsandbytes.nn.parametrize`): its bytes are packed, and
reading it gives the exact values, in a tensor that lives as long as the pass through the module. Blocks of 64 weights
run on from one expert to the next, so that an expert whose size is a multiple of 64 has the values that a `Linear4bit`
of it has. `graftwork.compat.packed_weights` packs them while a base is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graftwork.adapters.experts import expert_weights


def unpack_experts(model: Any) -> None:
    """Replace each packed parameter of experts by a plain one that holds its exact values."""
    import torch
    from torch.nn.utils import parametrize

    for one in expert_weights(model):
        module, key = model.get_submodule(one.module), one.name.rpartition(".")[2]
        if not parametrize.is_parametrized(module, key):
            continue
        with torch.no_grad():
            plain = getattr(module, key).detach().clone()
        parametrize.remove_parametrizations(module, key, leave_parametrized=False)
        setattr(module, key, torch.nn.Parameter(plain, requires_grad=False))


@contextmanager
def as_parameters(model: Any) -> Iterator[None]:
    """Show packed experts as parameters of their shape, without memory, while PEFT looks for what it adapts.

    PEFT 0.21 wraps the parameters of a module in their own order, and packed ones in that of the alphabet: the names in
    a file would then mean other parameters than on a plain base. Upstream: torch's `register_parametrization` gives a
    module a class of its own, whose base is the module's.
    """
    import torch

    hidden = []
    for name in dict.fromkeys(one.module for one in expert_weights(model)):
        module = model.get_submodule(name)
        if not hasattr(module, "parametrizations"):
            continue
        packed, kind = module.parametrizations, type(module)
        hidden.append((module, packed, kind))
        del module.parametrizations
        module.__class__ = kind.__base__
        for key, values in packed.items():
            state = values[0].quant_state
            shown = torch.empty(1, dtype=state.dtype, device=values.original.device).expand(state.shape)
            module.register_parameter(key, torch.nn.Parameter(shown, requires_grad=False))
    try:
        yield
    finally:
        for module, packed, kind in hidden:
            for key in packed:
                delattr(module, key)
            module.__class__ = kind
            module.parametrizations = packed
