"""Contrastive preference optimisation (arXiv 2401.08417) and SimPO (arXiv 2405.14734): pairs without a reference.

The losses are those of TRL 1.16's CPOTrainer, an experimental class that computes the logits of every position. The
trainer here scores answers alone, and takes both means over the whole step (`answer_trainer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.training.objectives.dpo import PairRows, read_pairs
from graftwork.training.objectives.preference import Inputs, RowLosses, answer_logps, answer_trainer, first_side
from graftwork.training.objectives.protocol import Part, Traits, check_pairs

if TYPE_CHECKING:
    import torch

    from graftwork.prompts.template import Template
    from graftwork.training.objectives.rows import ReadPart
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec

GAMMA = 0.5


class CpoSpec(Spec):
    """Contrastive preference optimisation; SimPO is `loss_type: simpo` with `cpo_alpha: 0`."""

    kind: Literal["cpo"] = "cpo"
    beta: float = Field(default=0.1, gt=0)
    """Scale of the difference in log probabilities."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    """sigmoid: CPO; hinge: SLiC (arXiv 2305.10425); ipo: arXiv 2310.12036; simpo: a margin between mean log
    probabilities."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are taken to be swapped; of loss_type=sigmoid and simpo."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy of the chosen answers."""
    simpo_gamma: float = Field(default=GAMMA, ge=0)
    """Margin of the rewards, of loss_type=simpo alone."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.loss_type in ("hinge", "ipo") and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} can't take effect with loss_type={self.loss_type}: it "
                "belongs to loss_type=sigmoid and simpo"
            )
        if self.loss_type != "simpo" and self.simpo_gamma != GAMMA:
            raise ValueError(
                f"simpo_gamma={self.simpo_gamma:g} can't take effect with loss_type={self.loss_type}: set "
                "loss_type=simpo"
            )
        return self

    @property
    def traits(self) -> Traits:
        return Traits(sequences=2, head="fused", conversations=False)

    def check(self, run: TrainSpec) -> None:
        check_pairs(run, self.kind)

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """Read the pairs of which both conversations fit. Raises DataError, StorageError."""
        return read_pairs(spec, template, part)

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Build the trainer of the pair loss and of the cross-entropy of the chosen answers."""
        return pair_trainer(setting, self, self.cpo_alpha)

    def losses(self, logps_N2: torch.Tensor, lengths_N2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each pair (N) and the rewards of both answers (N, 2)."""
        import torch

        beta, logsigmoid = self.beta, torch.nn.functional.logsigmoid
        if self.loss_type in ("ipo", "simpo"):
            logps_N2 = logps_N2 / lengths_N2
        delta_N = logps_N2[:, 0] - logps_N2[:, 1]
        if self.loss_type == "hinge":
            losses_N = torch.relu(1 - beta * delta_N)
        elif self.loss_type == "ipo":
            losses_N = (delta_N - 1 / (2 * beta)) ** 2
        else:
            margin_N = beta * delta_N - (self.simpo_gamma if self.loss_type == "simpo" else 0.0)
            swapped = self.label_smoothing
            losses_N = -(1 - swapped) * logsigmoid(margin_N) - swapped * logsigmoid(-margin_N)
        return losses_N, beta * logps_N2


class PairLoss(Protocol):
    """Loss of pairs by the policy's likelihoods alone."""

    def losses(self, logps_N2: torch.Tensor, lengths_N2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


def pair_trainer(setting: TrainerContext, objective: PairLoss, nll: float, *, on_prompt: bool = False) -> BuiltTrainer:
    """Build a trainer of the objective's pair loss plus `nll` times the chosen answers' mean -log p of a token.

    on_prompt: that mean is over the tokens of the prompt too.
    """
    from graftwork.training.objectives.trainer import BuiltTrainer

    data, micro_batch = setting.job.data, setting.job.spec.optim.rows_per_pass

    def collate(batch: list[dict[str, int]]) -> Inputs:
        inputs = setting.collate(batch)
        return {**inputs, "labels": first_side(inputs, 2, "attention_mask" if on_prompt else "completion_mask")}

    def loss(_trainer: Any, logps_N2: torch.Tensor, lengths_N2: torch.Tensor, _inputs: Inputs) -> RowLosses:
        losses_N, rewards_N2 = objective.losses(logps_N2, lengths_N2)
        chosen_N, rejected_N = rewards_N2.detach().unbind(1)
        return losses_N, {
            "rewards/chosen": chosen_N,
            "rewards/rejected": rejected_N,
            "rewards/accuracies": (chosen_N > rejected_N).float(),
            "rewards/margins": chosen_N - rejected_N,
        }

    trainer = answer_trainer(setting, loss, collate, 2, nll)

    def evaluate() -> Mapping[str, float]:
        assert isinstance(data.eval, PairRows), "called where the spec has data.eval, whose rows `read` returned"
        return evaluate_pairs(trainer, objective, data.eval, data.pad_id, micro_batch, nll, on_prompt)

    return BuiltTrainer(trainer, evaluate)


def evaluate_pairs(
    trainer: Any, objective: PairLoss, rows: PairRows, pad_id: int, micro: int, nll: float, on_prompt: bool
) -> Mapping[str, float]:
    """Loss, its cross-entropy, accuracy (the chosen answer has the higher reward) and rewards over all pairs."""
    import torch

    found = answer_logps(trainer, rows, np.arange(len(rows)), pad_id, micro, whole_first=on_prompt)
    logps_N3 = torch.from_numpy(found).double()
    lengths_N2 = torch.from_numpy(np.stack([rows.chosen.scored_N, rows.rejected.scored_N], axis=1))
    losses_N, rewards_N2 = objective.losses(logps_N3[:, :2], lengths_N2)
    tokens = rows.chosen.lengths_N.sum() - len(rows) if on_prompt else rows.chosen.scored_N.sum()
    nll_loss = -logps_N3[:, 2 if on_prompt else 0].sum() / int(tokens)
    chosen, rejected = rewards_N2.unbind(1)
    return {
        "loss": (losses_N.mean() + nll * nll_loss).item(),
        "nll_loss": nll_loss.item(),
        "accuracy": (chosen > rejected).double().mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
    }
