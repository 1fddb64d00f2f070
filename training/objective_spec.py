"""What is learned: the kinds of finetuning; rows by `training.rows`, trainers by `training.objectives`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.training.text_spec import CptSpec, Packing


class SftSpec(Spec):
    """Supervised finetuning: the loss falls on the assistant's turns, by the mask of `chat.render`."""

    kind: Literal["sft"] = "sft"
    packing: Packing = "none"
    """best_fit: several whole conversations a row, none sees another. No padding, so fewer tokens to compute."""


class FimSpec(Spec):
    """Infilling: a document becomes prefix, suffix and middle (Bavarian et al. 2022, arXiv 2207.14255)."""

    kind: Literal["fim"] = "fim"


class DpoSpec(Spec):
    """Direct preference optimisation on `chosen` and `rejected` answers (arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference: what training began from, the base or `init_from`."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """sigmoid: DPO; hinge: SLiC (arXiv 2305.10425); ipo: arXiv 2310.12036; robust: arXiv 2403.00409."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are taken to be swapped; of loss=robust alone."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if (self.loss == "robust") != (self.label_smoothing > 0):
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} with loss={self.loss}: it belongs to loss=robust, which "
                "needs one above 0"
            )
        return self


class RewardSpec(Spec):
    """A reward model of `chosen` and `rejected` answers: Bradley-Terry."""

    kind: Literal["reward"] = "reward"
    centre: float = Field(default=0.0, ge=0)
    """Pull of the rewards' mean towards 0: this times (chosen + rejected) squared (arXiv 2312.09244); 0.01 is usual."""


class RlSpec(Spec):
    """Reinforcement learning from rewards on sampled answers: GRPO (arXiv 2402.03300) or RLOO (arXiv 2402.14740)."""

    kind: Literal["grpo", "rloo"]


class DistillSpec(Spec):
    """Learning a teacher's next-token distributions (GKD, arXiv 2306.13649), or its filtered texts."""

    kind: Literal["distill"] = "distill"


ObjectiveSpec = Annotated[
    SftSpec | CptSpec | FimSpec | DpoSpec | RewardSpec | RlSpec | DistillSpec, Field(discriminator="kind")
]
