"""Reward models: TRL's RewardTrainer (Bradley-Terry) on pairs that are already token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from graftwork.adapters.spec import kinds_with
from graftwork.config import Spec
from graftwork.training.objectives.dpo import read_pairs
from graftwork.training.objectives.protocol import Part, Traits, check_pairs

if TYPE_CHECKING:
    import torch

    from graftwork.prompts.template import Template
    from graftwork.training.objectives.rows import ReadPart
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec


class RewardSpec(Spec):
    """A reward model of `chosen` and `rejected` answers: Bradley-Terry."""

    kind: Literal["reward"] = "reward"
    centre: float = Field(default=0.0, ge=0)
    """Pull of the rewards' mean towards 0: this times (chosen + rejected) squared (arXiv 2312.09244); 0.01 is usual."""

    @property
    def traits(self) -> Traits:
        return Traits(sequences=2, head="reward", conversations=False, reward_head=True, adds_up=False)

    def check(self, run: TrainSpec) -> None:
        check_pairs(run, self.kind)
        if not run.adapter.trains_score_head:
            raise ValueError(
                f"adapter.kind={run.adapter.kind} with objective.kind={self.kind}: a reward model is a "
                f"{kinds_with('trains_score_head')} adapter with a score head"
            )

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """Read the pairs of which both conversations fit. Raises DataError, StorageError."""
        return read_pairs(spec, template, part)

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """A scalar head and adapter learned from the setting's pairs."""
        from trl import RewardConfig, RewardTrainer

        from graftwork.compat.hf import takes_token_rows
        from graftwork.training.objectives.trainer import BuiltTrainer, arguments, without_history

        spec, data = setting.job.spec, setting.job.data
        micro_batch = spec.optim.rows_per_pass

        def collate(batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
            rows = setting.collate(batch)
            return {key: rows[key] for key in ("input_ids", "attention_mask")}

        trainer = without_history(takes_token_rows(RewardTrainer))(
            args=RewardConfig(**arguments(setting), max_length=None, center_rewards_coefficient=self.centre or None),
            **{**setting.trainer_arguments(), "data_collator": collate},
        )

        def evaluate() -> Mapping[str, float]:
            assert data.eval is not None, "asked where the spec has data.eval"
            return held_out(trainer, self, data.eval, data.pad_id, micro_batch)

        return BuiltTrainer(trainer, evaluate)


def held_out(trainer: Any, objective: RewardSpec, rows: Any, pad_id: int, micro: int) -> Mapping[str, float]:
    """Loss, accuracy (the chosen answer has the higher reward), margin and mean reward over all pairs."""
    import torch

    from graftwork.training.objectives.reward_head import rewards_of
    from graftwork.training.objectives.trainer import share

    accelerator = trainer.accelerator
    sums_N2 = torch.zeros((len(rows), 2), device=accelerator.device)
    trainer.model.eval()
    for places in share(rows.lengths_N, micro, accelerator.process_index, accelerator.num_processes):
        for side, side_rows in enumerate((rows.chosen, rows.rejected)):
            with accelerator.autocast():
                sums_N2[list(places), side] = rewards_of(trainer.model, side_rows, places, pad_id)
    trainer.model.train()
    chosen, rejected = accelerator.reduce(sums_N2, reduction="sum").double().unbind(1)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    loss += objective.centre * ((chosen + rejected) ** 2).mean()
    return {
        "loss": loss.item(),
        "accuracy": (chosen > rejected).double().mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "mean_reward": ((chosen + rejected) / 2).mean().item(),
    }
