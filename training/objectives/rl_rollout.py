"""Answers sampled from the trained model in one batch, each by its own numbers, on a cache; and their rewards.

A prompt is computed once for all its answers, and a finished answer leaves the batch. transformers' `generate` computes
prompts once an answer, computes finished rows to the end, and draws from one global generator, so that an answer would
depend on its neighbours: on the number of workers, and on whether the run was resumed.

Legend: P prompts, C answers a prompt, B = P·C rows not yet finished, T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import DynamicCache

from graftwork.base.load import template as base_template
from graftwork.errors import GraftworkError
from graftwork.prompts.template import Template
from graftwork.training.objectives.reward_head import load_scorer
from graftwork.training.objectives.rl import PromptRows
from graftwork.training.objectives.trainer import TrainerContext, share
from graftwork.training.rewards import AnyReward, ModelReward, Reward, checked, total

T = TypeVar("T")


@dataclass(frozen=True)
class RolloutSampling:
    """Settings of sampling."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    pad_id: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0


@torch.no_grad()
def sample(
    model: Any,
    rows: PromptRows,
    indices: Sequence[int],
    copies: int,
    seeds: Sequence[Sequence[int]],
    sampling: RolloutSampling,
    autocast: AbstractContextManager[Any] | None = None,
) -> list[list[int]]:
    """Ids of `copies` answers to each prompt, prompt by prompt; each ends with a stop id, or after `max_new_tokens`.

    seeds: one key an answer, in the same order: equal keys and weights give equal answers, whatever else is in the
    batch, but for the rounding of sums. The model is in training mode before and after.
    """
    was_training = model.training
    model.eval()  # no dropout, no checkpointing
    try:
        with autocast or nullcontext():
            return _decode_batch(model, rows.collate(indices, sampling.pad_id), copies, seeds, sampling)
    finally:
        model.train(was_training)


def _decode_batch(
    model: Any, prompts: dict[str, torch.Tensor], copies: int, seeds: Sequence[Sequence[int]], sampling: RolloutSampling
) -> list[list[int]]:
    device = model.device
    mask_PT = prompts["attention_mask"].to(device)
    cache = DynamicCache(config=model.config)
    logits_PV = _forward(model, prompts["input_ids"].to(device), mask_PT, cache)
    cache.batch_repeat_interleave(copies)
    logits_BV, mask_BT = (tensor.repeat_interleave(copies, dim=0) for tensor in (logits_PV, mask_PT))
    draws = [np.random.default_rng(list(seed)).random(sampling.max_new_tokens) for seed in seeds]
    answers: list[list[int]] = [[] for _ in seeds]
    running = list(range(len(seeds)))
    for step in range(sampling.max_new_tokens):
        tokens_B = _choose(logits_BV, np.array([draws[row][step] for row in running]), sampling)
        for row, token in zip(running, tokens_B.tolist(), strict=True):
            answers[row].append(token)
        going = [place for place, row in enumerate(running) if answers[row][-1] not in sampling.stop_ids]
        if not going or step == sampling.max_new_tokens - 1:
            break
        if len(going) < len(running):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            tokens_B, mask_BT, running = tokens_B[kept], mask_BT[kept], [running[place] for place in going]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
        logits_BV = _forward(model, tokens_B[:, None], mask_BT, cache)
    return answers


def _forward(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits of each row's last position, in fp32."""
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_BV: torch.Tensor = output.logits[:, -1].float()
    return logits_BV


def _choose(
    logits_BV: torch.Tensor, draws_B: "np.typing.NDArray[np.float64]", sampling: RolloutSampling
) -> torch.Tensor:
    """The token at each row's number in [0, 1) of the cumulated probabilities. In double: a sum of 49k terms."""
    if not sampling.temperature:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = (logits_BV / sampling.temperature).double().softmax(dim=-1)
    order_BV = None
    if sampling.top_p < 1:
        probabilities_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    cumulated_BV = probabilities_BV.cumsum(dim=-1)
    draws_B1 = torch.from_numpy(draws_B).to(logits_BV.device)[:, None] * cumulated_BV[:, -1:]
    places_B1 = torch.searchsorted(cumulated_BV, draws_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return (places_B1 if order_BV is None else order_BV.gather(1, places_B1)).squeeze(1)


@dataclass(frozen=True)
class RewardScorer:
    """The rewards of a run, asked with ids."""

    rewards: tuple[AnyReward, ...]
    template: Template
    models: Mapping[str, Callable[[list[list[int]]], list[float]]]
    """By label: what gives the rewards of whole conversations."""

    @classmethod
    def load(cls, rewards: tuple[AnyReward, ...], setting: TrainerContext) -> "RewardScorer":
        """With its reward models loaded, each on a base of its own."""
        spec = setting.job.spec
        models = {
            reward.label: load_scorer(spec.root, reward.content, setting.base, spec.quant, str(setting.model.device))
            for reward in rewards
            if isinstance(reward, ModelReward)
        }
        return cls(rewards, base_template(setting.base), models)

    def values(
        self, place: int, rows: PromptRows, indices: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        """The reward at `place` of an answer to each of these prompts. Raises BadReward, DataError."""
        reward = self.rewards[place]
        asked = [(rows.rows[index], self.text(ids)) for index, ids in zip(indices, answers, strict=True)]
        if isinstance(reward, Reward):
            return [reward.compute(text, row) for row, text in asked]
        whole = [[*rows.ids(index), *ids] for index, ids in zip(indices, answers, strict=True)]
        values = self.models[reward.label](whole)
        return [checked(reward, row, value, text) for (row, text), value in zip(asked, values, strict=True)]

    def text(self, ids: Sequence[int]) -> str:
        """An answer as its reader gets it."""
        ended = len(ids) > 0 and ids[-1] in self.template.stop_ids
        return self.template.decode(ids[:-1] if ended else ids)


def trl_reward(scorer: RewardScorer, place: int, rows: PromptRows) -> Callable[..., list[float]]:
    """A reward in the form that TRL's trainers call, known to them by its label."""

    def reward(prompts: list[dict[str, int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        indices = [prompt["row"] for prompt in prompts]
        return on_all_ranks(lambda: scorer.values(place, rows, indices, completion_ids))

    reward.__name__ = scorer.rewards[place].label
    return reward


def evaluated(trainer: Any, scorer: RewardScorer, setting: TrainerContext) -> Mapping[str, float]:
    """Mean rewards of greedy answers to the held-out prompts; `loss` is minus their weighed sum. On all ranks."""
    rows, accelerator = setting.job.data.eval, trainer.accelerator
    assert isinstance(rows, PromptRows), "asked where the spec has data.eval"
    greedy = replace(trainer.sampling, temperature=0.0)
    size = setting.plan.micro_batch * rows.generations

    def sums() -> list[float]:
        found = [0.0] * (len(scorer.rewards) + 4)
        for indices in share(rows.lengths_N, size, accelerator.process_index, accelerator.num_processes):
            answers = sample(trainer.model, rows, indices, 1, [(0,)] * len(indices), greedy, accelerator.autocast())
            by_reward = [scorer.values(place, rows, indices, answers) for place in range(len(scorer.rewards))]
            for values, ids in zip(zip(*by_reward, strict=True), answers, strict=True):
                clipped = float(ids[-1] not in greedy.stop_ids)
                more = (*values, total(scorer.rewards, values), len(ids), clipped, 1.0)
                found = [so_far + one for so_far, one in zip(found, more, strict=True)]
        return found

    mine = torch.tensor(on_all_ranks(sums), dtype=torch.float64, device=accelerator.device)
    *rewards, reward, tokens, clipped, count = accelerator.reduce(mine, reduction="sum").tolist()
    named = {f"rewards/{one.label}": value / count for one, value in zip(scorer.rewards, rewards, strict=True)}
    return {
        "loss": -reward / count,
        "reward": reward / count,
        **named,
        "completions/mean_length": tokens / count,
        "completions/clipped_ratio": clipped / count,
    }


def on_all_ranks(work: Callable[[], T]) -> T:
    """The result of this rank's work. An error of one rank is raised on all: none waits for another that has ended."""
    result: T | None = None
    error: GraftworkError | None = None
    try:
        result = work()
    except GraftworkError as caught:
        error = caught
    for found in gather_object([error]):
        if found is not None:
            raise found
    return result  # type: ignore[return-value]  # there is one where no error was raised
