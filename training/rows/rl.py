"""Prompts to be answered: rendered by `chat.render`, retrieved passages among them, each with what it is scored by."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graftwork import chat, data, retrieval
from graftwork.data import DatasetRow
from graftwork.training.rewards.load import check_rows, load_rewards
from graftwork.training.rewards.reward import AnyReward
from graftwork.training.rl_spec import RlSpec
from graftwork.training.rows.part import Part, ReadPart, nothing_left, read_prompt, too_long
from graftwork.training.rows.token_rows import TokenRows
from graftwork.training.spec import TrainSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PromptRows:
    """Prompts and what their answers are rewarded by. N prompts."""

    prompts: TokenRows
    rows: tuple[DatasetRow, ...]
    """What each prompt came from, in the same order."""
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

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """Input ids and attention mask (B, T), padded on the left, so that answers begin in one column."""
        import torch

        width = int(max(self.prompts.lengths_N[i] for i in indices))
        ids_BT = torch.full((len(indices), width), pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(indices), width), dtype=torch.long)
        for place, index in enumerate(indices):
            ids = torch.tensor(self.ids(int(index)))
            ids_BT[place, width - len(ids) :] = ids
            mask_BT[place, width - len(ids) :] = 1
        return {"input_ids": ids_BT, "attention_mask": mask_BT}


def read(spec: TrainSpec, template: chat.Template, part: Part) -> ReadPart:
    """The prompts that leave room for an answer. Raises DataError, StorageError, ConfigError (rewards)."""
    objective = spec.objective
    assert isinstance(objective, RlSpec)
    uri, limit = (spec.data.train, spec.data.train_rows) if part == "train" else (spec.data.eval, spec.data.eval_rows)
    assert uri is not None, "asked for a part that the spec has"
    rewards = load_rewards(objective.rewards, spec)
    keys = data.key_check("prompt")
    raw = data.read_rows(uri, limit=limit, need="prompt", keys=keys)
    contents, (prompt, shots) = array("q", [hash(row.question) for row in raw]), read_prompt(spec, part)
    check_rows(rewards, objective.rewards, raw)
    rendered, left_out = _rendered(spec, template, prompt, raw, spec.seed if part == "train" else spec.seed + 1)
    room = spec.max_length - objective.max_new_tokens
    fitting = [place for place, ids in enumerate(rendered) if len(ids) <= room]
    for place, ids in enumerate(rendered):
        if len(ids) > room and spec.on_overlong == "refuse":
            tokens = len(ids) + objective.max_new_tokens
            raise too_long(spec, part, place + 1, raw[place].id, tokens)
    if not fitting:
        raise nothing_left(spec, part, len(raw))
    return ReadPart(
        PromptRows(
            TokenRows.from_pairs([(rendered[place], [False] * len(rendered[place])) for place in fitting]),
            tuple(raw[place] for place in fitting),
            rewards, objective.generations, objective.max_new_tokens, data.fingerprint(raw),
        ),
        len(raw) - len(fitting),
        data.fingerprint(raw),
        _notes(spec, left_out),
        warnings=(*keys.note(f"data.{part}"), *shots),
        contents=contents,
    )  # fmt: skip


def _rendered(
    spec: TrainSpec, template: chat.Template, prompt: chat.Prompt, rows: Sequence[DatasetRow], seed: int
) -> tuple[list[tuple[int, ...]], int]:
    """Ids of each prompt, and how many passages had no room."""
    context, left_out = spec.data.context, 0
    passages = retrieval.training_context(context, seed) if context else None
    rendered = []
    for row in rows:
        found, without = chat.fit_passages(
            passages(row) if passages else (), template, prompt, context.context_tokens if context else None
        )
        left_out += len(without)
        rendered.append(chat.render(row.question, template, prompt=prompt, context=found, generate=True).ids)
    return rendered, left_out


def _notes(spec: TrainSpec, left_out: int) -> tuple[str, ...]:
    if not left_out or spec.data.context is None:
        return ()
    return (
        f"{left_out} passages left out (no room in data.context.context_tokens={spec.data.context.context_tokens})",
    )
