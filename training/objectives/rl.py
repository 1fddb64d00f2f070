"""Reinforcement learning by GRPO or RLOO: prompts with their rewards, and TRL's trainers on them.

Not taken from TRL: tokenising (prompts come as ids from `render`), generating (`rl_rollout.py` has the reason),
and, on a CPU, its fused head, which scores the prompts' positions too (see objectives/sft.py).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from graftwork import retrieval
from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow, fingerprint, key_check, read_rows, render_question
from graftwork.prompts.render import Prompt, fit_passages
from graftwork.training.objectives.protocol import Part, Traits, nothing_left, passages_left_out, too_long
from graftwork.training.objectives.rows import IGNORED, ReadPart, TokenRows, data_of, pad_left, read_prompt
from graftwork.training.rewards import AnyReward, RewardFunctionSpec, check_rows, load_rewards

if TYPE_CHECKING:
    import torch
    from trl import GRPOConfig, RLOOConfig

    from graftwork.prompts.template import Template
    from graftwork.training.loop import StepPlan
    from graftwork.training.objectives.rl_rollout import RolloutSampling
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec

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
"""TRL's figures of a step that are reported, besides those of each reward."""


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

    @property
    def traits(self) -> Traits:
        return Traits(sequences=self.generations, samples_answers=True, steps_per_batch=self.iterations)

    def check(self, run: TrainSpec) -> None:
        adapter, where = run.adapter, f"objective.kind={self.kind}"
        if adapter.virtual_tokens or adapter.trains_base:
            sampled = "its answers are sampled from a cache"
            why = sampled if adapter.virtual_tokens else "its reference is the frozen base"
            raise ValueError(f"{where} does not train adapter.kind={adapter.kind}: {why}; use lora, ia3 or bottleneck")
        if adapter.input_dropout:
            raise ValueError(
                f"{where} with adapter.dropout={adapter.input_dropout:g}: an answer's likelihood would differ from "
                "one pass to the next; set adapter.dropout=0"
            )
        if run.strategy.kind != "ddp":
            raise ValueError(
                f"{where} with strategy.kind={run.strategy.kind}: every worker samples answers from a whole "
                "model; set strategy.kind=ddp, and quant.kind=nf4 where it must be smaller"
            )
        if self.max_new_tokens >= run.max_length:
            raise ValueError(
                f"objective.max_new_tokens={self.max_new_tokens} leaves a prompt no room in "
                f"max_length={run.max_length}: prompt and answer share it"
            )
        if run.checkpoint_every % self.iterations:
            raise ValueError(
                f"checkpoint_every={run.checkpoint_every} must be a multiple of objective.iterations="
                f"{self.iterations}: sampled answers are not kept in a checkpoint"
            )

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """The prompts that leave room for an answer. Raises DataError, StorageError, ConfigError (rewards)."""
        source, limit = data_of(spec, part)
        rewards = load_rewards(self.rewards, spec)
        keys = key_check("prompt")
        raw = read_rows(source, limit=limit, need="prompt", keys=keys)
        contents, (prompt, shots) = array("q", [row.content_hash() for row in raw]), read_prompt(spec, part)
        check_rows(rewards, self.rewards, raw)
        rendered, left_out = _render_prompts(
            spec, template, prompt, raw, spec.seed if part == "train" else spec.seed + 1
        )
        room = spec.max_length - self.max_new_tokens
        fitting = [place for place, ids in enumerate(rendered) if len(ids) <= room]
        for place, ids in enumerate(rendered):
            if len(ids) > room and spec.on_overlong == "refuse":
                tokens = len(ids) + self.max_new_tokens
                raise too_long(spec, part, place + 1, raw[place].id, tokens)
        if not fitting:
            raise nothing_left(spec, part, len(raw))
        return ReadPart(
            PromptRows(
                TokenRows.from_pairs([(rendered[place], [False] * len(rendered[place])) for place in fitting]),
                tuple(raw[place] for place in fitting),
                rewards,
                self.generations,
                self.max_new_tokens,
                fingerprint(raw),
            ),
            len(raw) - len(fitting),
            fingerprint(raw),
            passages_left_out(spec, left_out) if left_out else (),
            warnings=(*keys.note(f"data.{part}"), *shots),
            contents=contents,
            keys=keys,
            numbers=tuple(place + 1 for place in fitting),
        )

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """GRPO or RLOO on the setting's prompts, and what greedy answers to the held-out ones are worth."""
        from datasets import Dataset
        from trl import GRPOTrainer, RLOOTrainer

        from graftwork.training.objectives.rl_rollout import RewardScorer, RolloutSampling, evaluated, trl_reward
        from graftwork.training.objectives.trainer import BuiltTrainer

        rows = setting.job.data.train
        assert isinstance(rows, PromptRows)
        scorer = RewardScorer.load(rows.rewards, setting)
        trainer = on_rows(GRPOTrainer if self.kind == "grpo" else RLOOTrainer)(
            model=setting.model,
            args=_config(setting, self),
            reward_funcs=[trl_reward(scorer, place, rows) for place in range(len(rows.rewards))],
            train_dataset=Dataset.from_list([{"prompt": one} for one in prompts_of(setting.plan, self.iterations)]),
            processing_class=setting.tokenizer(),
            callbacks=[setting.callback],
        )
        trainer.rows, trainer.eos_token_ids = rows, sorted(scorer.template.stop_ids)
        trainer.sampling = RolloutSampling(
            self.max_new_tokens,
            scorer.template.stop_ids,
            scorer.template.pad_id,
            self.temperature,
            self.top_p,
        )
        _set_reference(setting)
        return BuiltTrainer(trainer, lambda: evaluated(trainer, scorer, setting), decodes=True)


@dataclass(frozen=True)
class PromptRows:
    """Prompts and what their answers are rewarded by. N prompts."""

    prompts: TokenRows
    rows: tuple[DatasetRow, ...]
    """The row of each prompt, in the same order."""
    rewards: tuple[AnyReward, ...]
    generations: int
    max_new_tokens: int
    raw: str
    """Digest of the raw rows: gold is part of what is learned from."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Most tokens of each prompt with all its answers."""
        return self.generations * (self.prompts.lengths_N + self.max_new_tokens)

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Most tokens of the answers to each prompt."""
        return np.full(len(self), self.generations * self.max_new_tokens, dtype=np.int64)

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """Most tokens of a prompt with one answer."""
        return self.prompts.lengths_N + self.max_new_tokens

    def ids(self, index: int) -> list[int]:
        """Ids of one prompt."""
        ids: list[int] = self.prompts.row(index)[0].tolist()
        return ids

    def digest(self) -> str:
        """sha256 hex over the prompts, the raw rows, and the rewards with their schemas and pinned models."""
        parts = (self.prompts.digest(), self.raw, *(reward.content for reward in self.rewards))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
        """Input ids and attention mask (B, T), padded on the left, so that answers begin in one column."""
        ids_BT, mask_BT = pad_left([self.ids(int(index)) for index in indices], pad_id)
        return {"input_ids": ids_BT, "attention_mask": mask_BT}


def _render_prompts(
    spec: TrainSpec, template: Template, prompt: Prompt, rows: Sequence[DatasetRow], seed: int
) -> tuple[list[tuple[int, ...]], int]:
    """Ids of each prompt, and how many passages had no room."""
    context, left_out = spec.data.context, 0
    passages = retrieval.training_context(context, seed) if context else None
    rendered = []
    for row in rows:
        found, without = fit_passages(
            passages(row) if passages else (), template, prompt, context.context_tokens if context else None
        )
        left_out += len(without)
        rendered.append(render_question(row, template, prompt, found, spec.data.thinking).ids)
    return rendered, left_out


def on_rows(trainer_class: type[Any]) -> type[Any]:
    """TRL's trainer with our prompts, answers and figures."""

    import torch

    from graftwork.compat.hf import own_rollouts, step_figures
    from graftwork.training.objectives.rl_rollout import sample
    from graftwork.training.objectives.trainer import without_history

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
            """As the plain trainer, with the reported figures, and all tokens of prompts and answers."""
            found = step_figures(self)
            told = {key: values for key, values in found.items() if key in FIGURES or key.startswith("rewards/")}
            found.clear()
            found.update(told, tokens=[float(self.state.num_input_tokens_seen)])
            super().log(logs, start_time)

    OnRows.__name__ = f"OnRows{trainer_class.__name__}"
    return OnRows


def answer_logps(
    model: Any, head: torch.nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor, answer: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities and entropies (B, answer) of the last `answer` tokens; 0 where the mask is."""
    import torch

    from graftwork.training.objectives.trainer import trained_logits

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


def _config(setting: TrainerContext, objective: RlSpec) -> GRPOConfig | RLOOConfig:
    """TRL's configuration. A pass takes whole prompts: their answers stay together, on one worker."""
    from trl import GRPOConfig, RLOOConfig

    from graftwork.training.objectives.trainer import arguments

    shared = arguments(setting)
    shared["per_device_train_batch_size"] *= objective.generations
    shared |= {
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
    scale = objective.scale_rewards
    if objective.kind == "rloo":
        return RLOOConfig(**shared, normalize_advantages=scale == "batch")
    return GRPOConfig(**shared, scale_rewards=scale or "group", loss_type=objective.loss_type or "dapo")


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
    """Set the reference of beta: the base, or the published adapter that training began from, as a frozen second one.

    TRL copies the adapter as it is now, which after a resume is not what training began from.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from graftwork.training.warm_start import adapter_folder

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
