"""Attention of short rows on a CPU in bfloat16, where torch's fused kernel is slow.

Forward and backward of 16 rows of 76 tokens, 9 heads of 64, one core (torch 2.13, AMD with AVX512-BF16): fused 24.5 ms,
products and softmax 11.8; rows of 160 26.0 and 20.4; of 400 41.6 and 56.5. In fp32 both take the same.

Legend: B rows, H query heads, K key heads, T tokens, D head size.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graftwork.compat.hf import attention_name
from graftwork.tuning.together.rule import LONGEST

NAME = "graftwork_short_rows"
HARMLESS = {"position_ids", "use_cache", "sliding_window"}
"""What models hand on beside; where a window would hide anything there is a mask."""


def prefer_products(model: Any) -> None:
    """Let a loaded base compute attention so where it is faster; elsewhere as before."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or attention_name(model.config) != "sdpa":
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """In the form that transformers asks for; whatever is no plain causal attention of short rows is left to sdpa."""
    plain = attention_mask is None and not dropout and more.keys() <= HARMLESS and getattr(module, "is_causal", True)
    if not plain or query.shape[2] > LONGEST or not torch.is_grad_enabled():
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return found
    return short_rows(query, key, value, scaling or query.shape[-1] ** -0.5).transpose(1, 2).contiguous(), None


def short_rows(q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention, (B, H, T, D), by products over all query heads of a key head at once; softmax in fp32."""
    rows, heads, tokens, size = q_BHTD.shape
    grouped = (rows, k_BKTD.shape[1], heads // k_BKTD.shape[1] * tokens)
    scores_BHTT = (q_BHTD.reshape(*grouped, size) @ k_BKTD.mT).view(rows, heads, tokens, tokens) * scaling
    later_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHTD.device).triu(1)
    chances = scores_BHTT.masked_fill(later_TT, -torch.inf).softmax(-1, dtype=torch.float32).to(v_BKTD.dtype)
    return (chances.view(*grouped, tokens) @ v_BKTD).view(rows, heads, tokens, size)
