"""Held-out answers generated greedily and compared with the right ones, on all ranks together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from graftwork.training.objectives.share import share
from graftwork.training.rows.answered import AnsweredRows

BATCH = 8
"""Prompts that are answered at once."""


@torch.no_grad()
def held_out_answers(trainer: Any, rows: AnsweredRows, tokenizer: Any, pad_id: int, most: int) -> Mapping[str, float]:
    """Shares from 0 to 1: `exact_match`, `edit_similarity` (mean), and `exact_match[GROUP]` of each group.

    most: tokens generated for an answer at the most. Called on all ranks.
    """
    model, accelerator = trainer.model, trainer.accelerator
    groups = sorted(set(rows.groups_N))
    sums = torch.zeros(2 + len(groups), 2, dtype=torch.float64, device=accelerator.device)
    training = model.training
    model.eval()
    for batch in share(rows.starts_N, BATCH, accelerator.process_index, accelerator.num_processes):
        with accelerator.autocast():
            ends = [rows.answer(index)[-1] for index in batch]
            said = greedy(model, [rows.prompt(index) for index in batch], ends, pad_id, most)
        for index, ids in zip(batch, said, strict=True):
            text, right = tokenizer.decode(ids), tokenizer.decode(rows.answer(index)[:-1])
            exact = float(text == right)
            sums[0] += torch.tensor([exact, 1.0])
            sums[1] += torch.tensor([edit_similarity(text, right), 1.0])
            if groups:
                sums[2 + groups.index(rows.groups_N[index])] += torch.tensor([exact, 1.0])
    model.train(training)
    shares = accelerator.reduce(sums, reduction="sum").cpu()
    shares = (shares[:, 0] / shares[:, 1]).tolist()
    by_group = {f"exact_match[{group}]": value for group, value in zip(groups, shares[2:], strict=True)}
    return {"exact_match": shares[0], "edit_similarity": shares[1], **by_group}


def greedy(
    model: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], pad_id: int, most: int
) -> list[list[int]]:
    """The most probable continuation of each prompt, up to and without its end token."""
    width, device = max(map(len, prompts)), next(model.parameters()).device
    ids_BT = torch.full((len(prompts), width), pad_id, dtype=torch.long, device=device)
    mask_BT = torch.zeros_like(ids_BT)
    for place, prompt in enumerate(prompts):
        ids_BT[place, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_BT[place, width - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=sorted(set(ends)), pad_token_id=pad_id, use_cache=True
    )
    out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings)
    return [_until(row[width:].tolist(), end) for row, end in zip(out_BT, ends, strict=True)]


def edit_similarity(said: str, right: str) -> float:
    """1 less the edits (insert, delete, replace a character) over the length of the longer text; 1 for equal texts."""
    if said == right:
        return 1.0
    before = list(range(len(right) + 1))
    for row, char in enumerate(said, start=1):
        now = [row]
        for column, other in enumerate(right, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (char != other)))
        before = now
    return 1 - before[-1] / max(len(said), len(right))


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
