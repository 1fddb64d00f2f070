"""Muon (torch.optim.Muon) for the matrices of a model and AdamW for its other weights, as one optimizer.

Each matrix's update has the root mean square of AdamW's (`match_rms_adamw`, arXiv 2502.16982), so that one learning
rate holds for both parts.
"""

from collections.abc import Callable
from typing import Any, Self

import torch

from graftwork.training.optimizers import split_weights


class Muon(torch.optim.Optimizer):
    """torch's Muon and AdamW under one list of groups, which learning rate schedules and clipping read and set."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {key: parts[0].defaults[key] for key in ("lr", "weight_decay")})
        self._join()

    @classmethod
    def of_model(
        cls, model: torch.nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> Self:
        """Build it on the trained weights of a model. One-dimensional weights have no weight decay."""
        sorted_weights = list(split_weights(model))
        matrices = [weight for _, weight, matrix in sorted_weights if matrix]
        others = [weight for _, weight, matrix in sorted_weights if not matrix]
        parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        decayed = [weight for weight in others if weight.ndim > 1]
        plain = [weight for weight in others if weight.ndim <= 1]
        for weights, decay in ((decayed, weight_decay), (plain, 0.0)):
            if weights:
                parts.append(torch.optim.AdamW(weights, lr=lr, betas=betas, eps=eps, weight_decay=decay))
        return cls(parts)

    def _join(self) -> None:
        """Share the groups with the parts: a rate that is set here holds there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the states of both parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()
