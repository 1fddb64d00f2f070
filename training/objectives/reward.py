"""Reward models: TRL's RewardTrainer (Bradley-Terry) on pairs that are already token ids, and what they are asked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from trl import RewardConfig, RewardTrainer

from graftwork import artifact, base_model
from graftwork.base_model import QuantSpec, ResolvedBase
from graftwork.compat.hf import takes_token_rows
from graftwork.storage import Store
from graftwork.training.adapters.score_head import add_reward_head
from graftwork.training.objective_spec import RewardSpec
from graftwork.training.objectives.setting import (
    BuiltTrainer,
    TrainerContext,
    arguments,
    strip_callbacks,
    without_history,
)
from graftwork.training.objectives.share import share
from graftwork.training.reward_model import scoring_adapter
from graftwork.training.rows.token_rows import TokenRows

Scorer = Callable[[list[list[int]]], list[float]]
"""Token ids of conversations that end with an answer -> their rewards."""

SCORED_AT_ONCE = 8


class RewardPairTrainer(without_history(takes_token_rows(RewardTrainer))):  # type: ignore[misc]  # trl has no types
    """RewardTrainer that takes rows of token ids."""


def build(setting: TrainerContext) -> BuiltTrainer:
    """A scalar head and adapter learned from the setting's pairs."""
    spec, data = setting.job.spec, setting.job.data
    objective, micro_batch = spec.objective, spec.optim.rows_per_pass
    assert isinstance(objective, RewardSpec), "registered for this kind"

    def collate(batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        rows = setting.collate(batch)
        return {key: rows[key] for key in ("input_ids", "attention_mask")}

    trainer = RewardPairTrainer(
        model=setting.model,
        args=RewardConfig(**arguments(setting), max_length=None, center_rewards_coefficient=objective.centre or None),
        train_dataset=setting.dataset(),
        data_collator=collate,
        processing_class=setting.tokenizer(),
        callbacks=[setting.callback],
    )

    def evaluate() -> Mapping[str, float]:
        assert data.eval is not None, "asked where the spec has data.eval"
        return held_out(trainer, objective, data.eval, data.pad_id, micro_batch)

    return BuiltTrainer(strip_callbacks(trainer), evaluate)


def held_out(trainer: Any, objective: RewardSpec, rows: Any, pad_id: int, micro: int) -> Mapping[str, float]:
    """Loss, accuracy (the chosen answer has the higher reward), margin and mean reward over all pairs."""
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


@torch.no_grad()
def rewards_of(model: Any, rows: TokenRows, indices: Sequence[int], pad_id: int) -> torch.Tensor:
    """Rewards (B) of these rows by the model as it is."""
    inputs, device = rows.collate(indices, pad_id), next(model.parameters()).device
    masked = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}
    scores: torch.Tensor = model(**masked).logits[:, 0].float()
    return scores


def load_scorer(root: str, ref: str, base: ResolvedBase, quant: QuantSpec, device: str = "cpu") -> Scorer:
    """A published reward model (`task@alias`), on a base of its own in this process.

    Raises ArtifactError: no such adapter, one of another base, one that is no reward model.
    """
    store = Store(root)
    manifest = scoring_adapter(store, ref, base)
    loaded = base_model.load(base, quant, device=device, purpose="train")
    model = PeftModel.from_pretrained(
        add_reward_head(loaded.model), artifact.fetch(store, manifest.task, manifest.version)
    )
    model.eval()
    pad_id = base_model.template(base).pad_id

    def score(conversations: list[list[int]]) -> list[float]:
        rows = TokenRows.from_pairs([(ids, [False] * len(ids)) for ids in conversations])
        rewards = np.zeros(len(rows))
        with torch.autocast(device.partition(":")[0], dtype=loaded.dtype, enabled=device != "cpu"):
            for places in share(rows.lengths_N, SCORED_AT_ONCE, 0, 1):
                rewards[list(places)] = rewards_of(model, rows, places, pad_id).cpu().numpy()
        return [float(reward) for reward in rewards]

    return score
