"""TRL's GRPOTrainer and RLOOTrainer on our rows: their advantages and losses, our prompts, answers and rewards.

Not taken from TRL: tokenising (prompts come as ids from `chat.render`), generating (`rollout.py` says why), and, on a
CPU, its fused head, which scores the prompts' positions too (see objectives/sft.py).
"""

from collections import Counter
from typing import Any

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from graftwork.compat.hf import own_rollouts, step_figures
from graftwork.training.objectives.rl_rollout import (
    PromptRows,
    RewardScorer,
    RolloutSampling,
    evaluated,
    sample,
    trl_reward,
)
from graftwork.training.objectives.row_cache import IGNORED
from graftwork.training.objectives.spec import RlSpec
from graftwork.training.objectives.trainer import (
    BuiltTrainer,
    TrainerContext,
    arguments,
    trained_logits,
    without_history,
)
from graftwork.training.step_plan import StepPlan
from graftwork.training.warm_start import adapter_folder

REFERENCE = "ref"
"""TRL's name of the adapter that the reference answers with; without one the reference is the base."""
FIGURES = frozenset(
    {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "kl",
        "entropy",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/region_mean",
    }
)
"""TRL's figures of a step that are kept, those of each reward beside them."""


def on_rows(trainer_class: type[Any]) -> type[Any]:
    """TRL's trainer with our prompts, answers and figures."""

    class OnRows(without_history(own_rollouts(trainer_class))):  # type: ignore[misc]  # trl has no types
        rows: PromptRows
        sampling: RolloutSampling
        asked: list[dict[str, int]]
        """The row of each prompt of the batch, and which of the step's occurrences of that row it is."""

        def prompt_ids(self, prompts: list[dict[str, int]]) -> list[list[int]]:
            """Token ids of the prompts of a batch."""
            self.asked = prompts
            return [self.rows.ids(prompt["row"]) for prompt in prompts]

        def answer_ids(self) -> Any:
            """An answer of the model to each prompt of the batch."""
            copies = self.num_generations
            groups = self.asked[::copies]
            step = int(self.state.global_step)
            seeds = [(self.args.seed, step, one["row"], one["again"], copy) for one in groups for copy in range(copies)]
            indices = [one["row"] for one in groups]
            return sample(self.model, self.rows, indices, copies, seeds, self.sampling, self.accelerator.autocast())

        def answer_likelihoods(
            self, model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, answer: int, size: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Log probabilities and entropies (B, answer) of the last `answer` tokens, `size` rows at once."""
            head = self.model.get_output_embeddings()
            parts = [
                answer_logps(model, head, ids, mask, answer, self.temperature)
                for ids, mask in zip(ids_BT.split(size), mask_BT.split(size), strict=True)
            ]
            logps_BA, entropies_BA = (torch.cat(some) for some in zip(*parts, strict=True))
            return logps_BA, entropies_BA

        def save_model_files(self, folder: str | None, state_dict: Any) -> None:
            """The adapter alone: neither the reference nor the tokenizer, which TRL decodes with while it trains."""
            self.model.save_pretrained(folder, state_dict=state_dict, selected_adapters=["default"])

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            """As the plain trainer, with the figures that are told, and all tokens of prompts and answers."""
            found = step_figures(self)
            told = {key: values for key, values in found.items() if key in FIGURES or key.startswith("rewards/")}
            found.clear()
            found.update(told, tokens=[float(self.state.num_input_tokens_seen)])
            super().log(logs, start_time)

    OnRows.__name__ = f"OnRows{trainer_class.__name__}"
    return OnRows


def build(setting: TrainerContext) -> BuiltTrainer:
    """GRPO or RLOO on the setting's prompts, and what greedy answers to the held-out ones are worth."""
    objective, rows = setting.job.spec.objective, setting.job.data.train
    assert isinstance(objective, RlSpec)
    assert isinstance(rows, PromptRows)
    scorer = RewardScorer.load(rows.rewards, setting)
    grpo = objective.kind == "grpo"
    trainer = on_rows(GRPOTrainer if grpo else RLOOTrainer)(
        model=setting.model,
        args=_grpo_config(setting, objective) if grpo else _rloo_config(setting, objective),
        reward_funcs=[trl_reward(scorer, place, rows) for place in range(len(rows.rewards))],
        train_dataset=Dataset.from_list([{"prompt": one} for one in prompts_of(setting.plan, objective.iterations)]),
        processing_class=setting.tokenizer(),
        callbacks=[setting.callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.rows, trainer.eos_token_ids = rows, sorted(scorer.template.stop_ids)
    trainer.sampling = RolloutSampling(
        objective.max_new_tokens,
        scorer.template.stop_ids,
        scorer.template.pad_id,
        objective.temperature,
        objective.top_p,
    )
    _set_reference(setting)
    return BuiltTrainer(trainer, lambda: evaluated(trainer, scorer, setting))


def answer_logps(
    model: Any, head: torch.nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor, answer: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities and entropies (B, answer) of the last `answer` tokens; 0 where the mask is."""
    labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)
    labels_BT[:, :-answer] = IGNORED
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT, "labels": labels_BT}
    logits_NV, targets_N = trained_logits(model, head, inputs)
    all_NV = (logits_NV.float() / temperature).log_softmax(dim=-1)
    told_BA = labels_BT[:, -answer:] != IGNORED
    zeros_BA = all_NV.new_zeros(told_BA.shape)
    logps_BA = zeros_BA.masked_scatter(told_BA, all_NV.gather(1, targets_N[:, None]).squeeze(1))
    with torch.no_grad():
        entropies_BA = zeros_BA.masked_scatter(told_BA, -(all_NV.exp() * all_NV).sum(dim=-1))
    return logps_BA, entropies_BA


def _shared_config(setting: TrainerContext, objective: RlSpec) -> dict[str, Any]:
    """What both configs have. A pass takes whole prompts: their answers stay together, on one worker."""
    shared = arguments(setting)
    shared["per_device_train_batch_size"] *= objective.generations
    return {
        **shared,
        "num_generations": objective.generations,
        "max_completion_length": objective.max_new_tokens,
        "temperature": objective.temperature,
        "top_p": objective.top_p,
        "beta": objective.beta,
        "epsilon": objective.epsilon,
        "num_iterations": objective.iterations,
        "reward_weights": [reward.weight for reward in objective.rewards],
        "shuffle_dataset": False,  # the plan is the order
    }


def _grpo_config(setting: TrainerContext, objective: RlSpec) -> GRPOConfig:
    return GRPOConfig(
        **_shared_config(setting, objective),
        scale_rewards=objective.scale_rewards or "group",
        loss_type=objective.loss_type or "dapo",
    )


def _rloo_config(setting: TrainerContext, objective: RlSpec) -> RLOOConfig:
    return RLOOConfig(**_shared_config(setting, objective), normalize_advantages=objective.scale_rewards == "batch")


def prompts_of(plan: StepPlan, iterations: int) -> list[dict[str, int]]:
    """The prompts of all steps, as TRL deals them: each worker takes a stretch of a step, and TRL repeats the step.

    `again` counts up where a step asks a row more than once, so that it is answered anew.
    """
    prompts = []
    for step in plan.rows_SR[::iterations]:
        passes_GWM = step.reshape(plan.accumulation, -1, plan.micro_batch)
        seen: Counter[int] = Counter()
        for row in passes_GWM.swapaxes(0, 1).reshape(-1).tolist():
            prompts.append({"row": row, "again": seen[row]})
            seen[row] += 1
    return prompts


def _set_reference(setting: TrainerContext) -> None:
    """What beta pulls to: the base or, as a second and frozen adapter, the published one that training began from.

    TRL copies the adapter as it is now, which after a resume is not what training began from.
    """
    model = setting.model
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
    if setting.job.spec.init_from is None:
        return
    model.add_adapter(REFERENCE, model.peft_config["default"])
    set_peft_model_state_dict(
        model, load_file(adapter_folder(setting.job.spec) / "adapter_model.safetensors"), adapter_name=REFERENCE
    )
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
