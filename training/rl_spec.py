"""Reinforcement learning: answers are sampled, rewarded, and made likelier or less likely."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.training.reward_spec import RewardFunctionSpec

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec


class RlSpec(Spec):
    """Reinforcement learning from rewards on sampled answers: GRPO (arXiv 2402.03300) or RLOO (arXiv 2402.14740).

    A row is a prompt: `optim.rows_per_step` prompts a step, `optim.micro_batch` prompts with all their answers a pass.
    """

    kind: Literal["grpo", "rloo"]
    generations: int = Field(default=4, ge=2, le=64)
    """Answers to each prompt: what one answer is worth is told by the others."""
    max_new_tokens: int = Field(default=128, ge=1, le=8192)
    """An answer that has not ended by then is cut, and counted as clipped."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share."""
    beta: float = Field(default=0.04, ge=0)
    """Strength of the pull towards the reference: the adapter that training began from, or the base. 0: none."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """How far one update may move the likelihood of an answer before its gradient is cut: takes effect with
    `iterations` above 1."""
    iterations: int = Field(default=1, ge=1, le=16)
    """Optimizer steps on the same answers."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What rewards above the mean are divided by: the spread within a prompt's answers, that of the step, or nothing.
    null: group for grpo, none for rloo."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] | None = None
    """How tokens are averaged (grpo alone): over all tokens of the step (dapo, what null takes), each answer first
    (grpo), by `max_new_tokens` (dr_grpo, arXiv 2503.20783), within a pass (bnpo)."""
    rewards: tuple[RewardFunctionSpec, ...]

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "rloo" and self.loss_type is not None:
            raise ValueError(f"loss_type={self.loss_type} is grpo's: rloo weighs whole answers")
        if self.kind == "rloo" and self.scale_rewards == "group":
            raise ValueError("scale_rewards=group is grpo's: rloo takes batch or none")
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one, for example json")
        labels = [reward.label or reward.name for reward in self.rewards]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two rewards are called {twice[0]!r}: give one of them a `label`")
        return self


def check_rl(spec: "TrainSpec") -> None:
    """Raise ValueError where the rest of the spec does not go with reinforcement learning."""
    objective, adapter = spec.objective, spec.adapter
    if not isinstance(objective, RlSpec):
        return
    where = f"objective.kind={objective.kind}"
    if adapter.kind in ("full", "prefix"):
        why = "its answers are sampled from a cache" if adapter.kind == "prefix" else "its reference is the frozen base"
        raise ValueError(f"{where} does not train adapter.kind={adapter.kind}: {why}; use lora, ia3 or bottleneck")
    if adapter.kind == "lora" and adapter.dropout:
        raise ValueError(f"{where} with adapter.dropout={adapter.dropout:g}: an answer's likelihood would differ from "
                         "one pass to the next; set adapter.dropout=0")  # fmt: skip
    if spec.strategy.kind != "ddp":
        raise ValueError(f"{where} with strategy.kind={spec.strategy.kind}: every worker samples answers from a whole "
                         "model; set strategy.kind=ddp, and quant.kind=nf4 where it must be smaller")  # fmt: skip
    if objective.max_new_tokens >= spec.max_length:
        raise ValueError(f"objective.max_new_tokens={objective.max_new_tokens} leaves a prompt no room in "
                         f"max_length={spec.max_length}: prompt and answer share it")  # fmt: skip
    if spec.checkpoint_every % objective.iterations:
        raise ValueError(f"checkpoint_every={spec.checkpoint_every} must be a multiple of objective.iterations="
                         f"{objective.iterations}: sampled answers are not kept in a checkpoint")  # fmt: skip
