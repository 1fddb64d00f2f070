"""Answers -> rewards, in a worker: while training in TRL's form, and of greedy answers to the held-out prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object

from graftwork import base_model
from graftwork.chat import Template
from graftwork.errors import GraftworkError
from graftwork.training.objectives.reward import load_scorer
from graftwork.training.objectives.rollout import sample
from graftwork.training.objectives.setting import TrainerContext
from graftwork.training.objectives.share import share
from graftwork.training.rewards.reward import AnyReward, ModelReward, Reward, checked, total
from graftwork.training.rows.rl import PromptRows

T = TypeVar("T")


@dataclass(frozen=True)
class RewardScorer:
    """The rewards of a run, asked with ids."""

    rewards: tuple[AnyReward, ...]
    template: Template
    models: Mapping[str, Callable[[list[list[int]]], list[float]]]
    """By label: what gives the rewards of whole conversations."""

    @classmethod
    def load(cls, rewards: tuple[AnyReward, ...], setting: TrainerContext) -> "RewardScorer":
        """With its reward models loaded, each on a base of its own beside the one that is trained."""
        spec = setting.job.spec
        models = {
            reward.label: load_scorer(spec.root, reward.content, setting.base, spec.quant, str(setting.model.device))
            for reward in rewards
            if isinstance(reward, ModelReward)
        }
        return cls(rewards, base_model.template(setting.base), models)

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
        "loss": -reward / count, "reward": reward / count, **named,
        "completions/mean_length": tokens / count, "completions/clipped_ratio": clipped / count,
    }  # fmt: skip


def on_all_ranks(work: Callable[[], T]) -> T:
    """What this rank's work gives. An error of one rank is raised on all: none waits for another that has ended."""
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
