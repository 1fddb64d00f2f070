"""Answers sampled from the model that is trained: in one batch, each by its own numbers, on a cache.

A prompt is computed once for all its answers, and a finished answer leaves the batch. transformers' `generate` computes
prompts once an answer, computes finished rows to the end, and draws from one global generator, so that an answer would
depend on its neighbours: on the number of workers, and on whether the run was resumed.

Legend: P prompts, C answers a prompt, B = P·C rows not yet finished, T tokens so far, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from graftwork.training.rows.rl import PromptRows


@dataclass(frozen=True)
class RolloutSampling:
    """How tokens are chosen."""

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
            return _decoded(model, rows.collate(indices, sampling.pad_id), copies, seeds, sampling)
    finally:
        model.train(was_training)


def _decoded(
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
