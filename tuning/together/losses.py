"""Losses of several trials from one matrix of logits, which is gone through in parts that stay in a cache.

Legend: N scored positions of all copies, V vocabulary, C copies of the rows.
"""

from typing import Any

import torch

PART_BYTES = 8 * 2**20
"""Of fp32 logits at a time. 660 positions of a vocabulary of 49,152 would take 390 MB in three copies."""


def summed_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor, copies: int) -> torch.Tensor:
    """Cross-entropy in fp32, summed over each copy's positions: (C)."""
    losses_N = _CrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]  # torch's own
    sums: torch.Tensor = losses_N.view(copies, -1).sum(1)
    return sums


class _CrossEntropy(torch.autograd.Function):
    """Keeps the gradient of the logits, in their own dtype, in place of a copy of them in fp32."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        rows = max(1, PART_BYTES // (4 * logits_NV.shape[1]))
        keep = logits_NV.requires_grad
        gradients_NV = torch.empty_like(logits_NV) if keep else logits_NV
        losses = []
        for start in range(0, len(targets_N), rows):
            part, targets = logits_NV[start : start + rows].float(), targets_N[start : start + rows, None]
            total = part.logsumexp(dim=1, keepdim=True)
            losses.append((total - part.gather(1, targets))[:, 0])
            if keep:
                chances = part.sub_(total).exp_()
                chances.scatter_add_(1, targets, torch.full_like(total, -1.0))
                gradients_NV[start : start + rows] = chances
        ctx.save_for_backward(gradients_NV)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> Any:
        (gradients_NV,) = ctx.saved_tensors
        return gradients_NV * gradient_N[:, None].to(gradients_NV.dtype), None
