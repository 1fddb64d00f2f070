"""Changes logits before a token is chosen: bias, penalties, tokens held back, the grammar's mask.

Each function changes the given rows in place and no other. Legend: B rows of the batch, V vocabulary, E entries (one
token of one row), G rows with a grammar, W words of 32 tokens.
"""

from collections.abc import Sequence

import numpy
import torch

from graftwork.serving.engine.row import Row


def edit(scores_BV: torch.Tensor, rows: Sequence[Row]) -> None:
    """Applies what the rows ask for, in the order that `SamplingParams` names. scores_BV: float32, contiguous."""
    edited = [(place, row) for place, row in enumerate(rows) if row.edits]
    _bias(scores_BV, [(place, row) for place, row in edited if len(row.bias_ids)])
    _penalise(scores_BV, [(place, row) for place, row in edited if row.seen is not None and len(row.seen.ids)])
    _hold_back(scores_BV, [(n, row) for n, row in edited if row.place < row.params.min_new_tokens])
    _mask(scores_BV, [(place, row) for place, row in edited if row.matcher is not None])


def _bias(scores_BV: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    if rows:
        at_E = _entries(scores_BV, [(place, row.bias_ids) for place, row in rows])
        bias_E = torch.from_numpy(numpy.concatenate([row.biases for _, row in rows])).to(scores_BV.device)
        scores_BV.view(-1)[at_E] += bias_E


def _penalise(scores_BV: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    """Repetition as transformers' processor, then frequency and presence as the OpenAI API defines them."""
    if not rows:
        return
    seen = [row.seen for _, row in rows if row.seen is not None]
    at_E = _entries(scores_BV, [(place, one.ids) for (place, _), one in zip(rows, seen, strict=True)])
    params = [row.params for _, row in rows]
    sizes = [len(one.ids) for one in seen]
    per_row = numpy.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params], "f4")
    repetition_E, frequency_E, presence_E = torch.from_numpy(per_row.repeat(sizes, axis=0)).to(at_E.device).unbind(1)
    count_E = torch.from_numpy(numpy.concatenate([one.counts for one in seen])).to(at_E.device)
    flat = scores_BV.view(-1)
    score_E = flat[at_E]
    score_E = torch.where(score_E < 0, score_E * repetition_E, score_E / repetition_E)
    flat[at_E] = score_E - frequency_E * count_E - presence_E * (count_E > 0)


def _hold_back(scores_BV: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    if rows:
        scores_BV.view(-1)[_entries(scores_BV, [(place, row.held_back) for place, row in rows])] = float("-inf")


def _mask(scores_BV: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    if not rows:
        return
    vocab = scores_BV.shape[1]
    words_GW = numpy.zeros((len(rows), -(-vocab // 32)), numpy.int32)
    for words_W, (_, row) in zip(words_GW, rows, strict=True):
        assert row.matcher is not None, "these rows have one"
        row.matcher.fill(words_W)
    bytes_G = torch.from_numpy(words_GW.view(numpy.uint8)).to(scores_BV.device)
    bit_8 = torch.arange(8, dtype=torch.uint8, device=scores_BV.device)
    refused_GV = ((bytes_G[:, :, None] >> bit_8) & 1).view(len(rows), -1)[:, :vocab] == 0
    for refused_V, (place, _) in zip(refused_GV, rows, strict=True):
        scores_BV[place].masked_fill_(refused_V, float("-inf"))


def _entries(scores_BV: torch.Tensor, ids: "Sequence[tuple[int, numpy.typing.NDArray[numpy.int64]]]") -> torch.Tensor:
    """Indices of (row, tokens) into the flattened scores; no entry comes twice."""
    at_E = numpy.concatenate([place * scores_BV.shape[1] + tokens for place, tokens in ids])
    return torch.from_numpy(at_E).to(scores_BV.device)
