"""Whether a model keeps the documents of a packed row apart: tried on it, because nothing in its config says so."""

from typing import Any

import torch

from graftwork.base_support import PROBE_LENGTH, mixed_share, most_mixed, probe_ids
from graftwork.errors import ConfigError


@torch.no_grad()
def require_apart(model: Any) -> None:
    """Raises ConfigError where a document's logits depend on the one before it in its row.

    So do models with recurrent layers, or with positions that are no input. Weights that a strategy has sharded can't
    be asked before the first step, and are not.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids_T = torch.tensor(probe_ids(vocabulary), device=next(model.parameters()).device)
    places_T = torch.arange(PROBE_LENGTH, device=ids_T.device).repeat(2)
    training = model.training
    model.eval()
    alone = model(input_ids=ids_T[None, PROBE_LENGTH:], use_cache=False).logits[0]
    one = model(input_ids=ids_T[None], use_cache=False).logits[0, PROBE_LENGTH:]
    two = model(input_ids=ids_T[None], position_ids=places_T[None], use_cache=False).logits[0, PROBE_LENGTH:]
    model.train(training)
    mixed = mixed_share(alone=alone, one=one, two=two)
    if mixed <= most_mixed(model):
        return
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    raise ConfigError(
        "objective.packing=best_fit",
        f"{type(inner).__name__} lets documents of a row see each other ({mixed:.0%} as much as one document would)",
        "a packed document gets the logits that it gets alone",
        "set objective.packing=none",
    )
