"""Trainers of each kind of finetuning: TRL's, fed with the rows of `training.rows`, on steps that the plan orders.

The only folder that imports trl. A kind is a module with `build(setting) -> Training`.
"""

import importlib
from typing import Protocol

from graftwork.training.objectives.setting import BuiltTrainer, TrainerContext

BUILDERS = {
    "cpt": "graftwork.training.objectives.cpt",
    "fim": "graftwork.training.objectives.fim",
    "sft": "graftwork.training.objectives.sft",
    "dpo": "graftwork.training.objectives.dpo",
    "reward": "graftwork.training.objectives.reward",
    "distill": "graftwork.training.objectives.distill",
    "grpo": "graftwork.training.objectives.rl",
    "rloo": "graftwork.training.objectives.rl",
}


class Builder(Protocol):
    """A module of this folder."""

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """A trainer that takes the plan's steps in order and writes `folder/checkpoint-STEP` when told to."""
        ...


def build(setting: TrainerContext) -> BuiltTrainer:
    """The trainer of the setting's kind; imports trl (5 to 10 s). The adapter's weights stay as they came: in fp32.

    TRL 1.16 casts adapters on a quantised base to bf16. Without bf16 units that makes a step 1.7 times as long, and
    small updates are lost in 8 bits of mantissa. fp32 is PEFT's default; on CUDA autocast multiplies in bf16.
    """
    builder: Builder = importlib.import_module(BUILDERS[setting.job.spec.objective.kind])
    kept = [(parameter, parameter.data) for parameter in setting.model.parameters() if parameter.requires_grad]
    training = builder.build(setting)
    for parameter, data in kept:
        parameter.data = data
    return training
