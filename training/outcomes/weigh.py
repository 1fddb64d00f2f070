"""A model answers items: continuations weighed, answers written greedily. In a worker.

Legend: B rows, T tokens, N scored positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from graftwork.chat import Template
from graftwork.memory.sizes import BATCH_ROWS, BATCH_TOKENS
from graftwork.training.logits import trained_logits
from graftwork.training.outcomes.parts import Item, ItemGroup, ItemOutput
from graftwork.training.rows.token_rows import IGNORED


@torch.no_grad()
def answers(model: Any, part: ItemGroup, places: Sequence[int], template: Template) -> list[ItemOutput]:
    """What the model says to the items at `places`, in that order. Leaves the model in the mode it was in."""
    items = [part.items[at] for at in places]
    training = model.training
    model.eval()
    try:
        logprobs = _weighed(model, items, part.pad_id)
        texts = _written(model, items, part, template)
    finally:
        model.train(training)
    return [ItemOutput(tuple(logprobs[at]), texts[at]) for at in range(len(items))]


def _weighed(model: Any, items: Sequence[Item], pad_id: int) -> list[list[float]]:
    """Log-probability of each continuation of each item."""
    rows = [(at, item.prompt, one) for at, item in enumerate(items) for one in item.continuations]
    found = [0.0] * len(rows)
    for batch in _batches([len(prompt) + len(one) for _, prompt, one in rows]):
        sums = _sums(model, [(rows[n][1], rows[n][2]) for n in batch], pad_id)
        for n, value in zip(batch, sums, strict=True):
            found[n] = value
    told: list[list[float]] = [[] for _ in items]
    for (at, _, _), value in zip(rows, found, strict=True):
        told[at].append(value)
    return told


def _sums(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> list[float]:
    """Summed log-probability of each row's continuation behind its prompt."""
    width = max(len(prompt) + len(one) for prompt, one in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORED)
    for place, (prompt, one) in enumerate(rows):
        end = len(prompt) + len(one)
        ids_BT[place, :end] = torch.tensor([*prompt, *one])
        mask_BT[place, :end] = 1
        labels_BT[place, len(prompt) : end] = torch.tensor([*one])
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    logits_NV, targets_N = trained_logits(model, model.get_output_embeddings(), inputs)
    nats_N = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none").double()
    return [-float(part.sum()) for part in nats_N.split([len(one) for _, one in rows])]


def _written(model: Any, items: Sequence[Item], part: ItemGroup, template: Template) -> list[str]:
    texts = [""] * len(items)
    asked = [at for at, item in enumerate(items) if item.write]
    for batch in _batches([len(items[at].prompt) + items[at].write for at in asked]):
        places = [asked[n] for n in batch]
        written = _generated(model, [items[at] for at in places], part)
        for at, ids in zip(places, written, strict=True):
            texts[at] = template.decode(ids).strip()
    return texts


def _generated(model: Any, items: Sequence[Item], part: ItemGroup) -> list[list[int]]:
    """Greedy ids of each item's answer, the token that ended it left out."""
    from transformers import GenerationConfig

    width, most = max(len(item.prompt) for item in items), max(item.write for item in items)
    ids_BT = torch.full((len(items), width), part.pad_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for place, item in enumerate(items):
        ids_BT[place, width - len(item.prompt) :] = torch.tensor([*item.prompt])
        mask_BT[place, width - len(item.prompt) :] = 1
    greedy = GenerationConfig(
        max_new_tokens=most, do_sample=False, use_cache=True, eos_token_id=list(part.stop_ids), pad_token_id=part.pad_id
    )
    out_BT = model.generate(
        input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=greedy
    )
    return [_until_stop(row[: item.write], part.stop_ids)
            for row, item in zip(out_BT[:, width:].tolist(), items, strict=True)]  # fmt: skip


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in stop_ids), len(ids))]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows of similar length, so many as `BATCH_TOKENS` and `BATCH_ROWS` hold."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if batch and (len(batch) == BATCH_ROWS or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
