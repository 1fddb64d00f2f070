"""Logits of the positions that are scored, and of no others.

Legend: B rows, T tokens, N scored positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch

from graftwork.training.rows.token_rows import IGNORED


def trained_logits(
    model: Any, head: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and targets (N) of the positions whose next token is trained, through the model's own forward.

    A hook drops the other positions just before the output head, so that scaling or soft-capping after it still apply.
    """
    labels_BT = inputs["labels"]
    keep_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep_BT[:, :-1] = labels_BT[:, 1:] != IGNORED
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0][keep_BT], *args[1:]))
    try:
        output = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        hook.remove()
    return output.logits, labels_BT[:, 1:][keep_BT[:, :-1]]
