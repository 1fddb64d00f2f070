"""Whether a model keeps the documents of a packed row apart: tried on it, because nothing in its config says so."""

from typing import Any

import torch

from graftwork.errors import ConfigError

LENGTH = 12
MOST_MIXED = 0.5
"""Of what a document before it moves the logits by. Rounding alone, on the 135M base: 0 in fp32, 0.05 in bf16, 0.24
with int8 beside it. A model that does not keep them apart: 1."""


@torch.no_grad()
def require_apart(model: Any) -> None:
    """Raises ConfigError where a document's logits depend on the one before it in its row.

    So do models with recurrent layers, or with positions that are no input. Weights that a strategy has sharded can't
    be asked before the first step, and are not.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids_T = torch.arange(2 * LENGTH, device=next(model.parameters()).device) * 7 % vocabulary
    places_T = torch.arange(LENGTH, device=ids_T.device).repeat(2)
    training = model.training
    model.eval()
    alone = model(input_ids=ids_T[None, LENGTH:], use_cache=False).logits[0]
    one = model(input_ids=ids_T[None], use_cache=False).logits[0, LENGTH:]
    two = model(input_ids=ids_T[None], position_ids=places_T[None], use_cache=False).logits[0, LENGTH:]
    model.train(training)
    mixed = ((two - alone).abs().mean() / (one - alone).abs().mean().clamp(min=1e-9)).item()
    if mixed <= MOST_MIXED:
        return
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    raise ConfigError(
        "objective.packing=best_fit",
        f"{type(inner).__name__} lets documents of a row see each other ({mixed:.0%} as much as one document would)",
        "a packed document gets the logits that it gets alone",
        "set objective.packing=none",
    )
