"""Embedding and output rows replaced request by request, and trained embeddings before a prompt.

The base's layers run as they are; afterwards the rows of the tokens concerned are overwritten. Both layers are hooked
once; a step without such adapters costs one comparison each.
Legend: T packed tokens, M of them overwritten, N chosen tokens, K trained rows, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from graftwork.serving.engine.adapters.changes import OutputRows
from graftwork.serving.engine.batch import StepBatch
from graftwork.serving.engine.slots import LoadedAdapter

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input of the layer, its result) -> the result, changed in place where it may be."""


class LayerEnd:
    """One layer hooked at its end. `change` is set around a forward pass."""

    def __init__(self, layer: torch.nn.Module | None) -> None:
        self.change: Change | None = None
        self._layer: Any = layer
        self._own: Callable[..., torch.Tensor] | None = None
        if layer is not None:
            self._hook(layer)

    def unhook(self) -> None:
        """Gives the layer the forward back that it had before."""
        if self._layer is None:
            return
        if self._own is None:
            del self._layer.forward
        else:
            self._layer.forward = self._own
        self._layer = None

    def _hook(self, layer: torch.nn.Module) -> None:
        inner: Callable[..., torch.Tensor] = layer.forward
        self._own = layer.__dict__.get("forward")  # another hook's, which takes itself away later

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            result = inner(x, *args, **kwargs)
            return result if self.change is None else self.change(x, result)

        layer.forward = forward


class InputChange:
    """Overwrites the embeddings of some packed tokens: rows_MH at places_M."""

    def __init__(self, places_M: torch.Tensor, rows_MH: torch.Tensor) -> None:
        self._places_M, self._rows_MH = places_M, rows_MH

    def __call__(self, ids_1T: torch.Tensor, result_1TH: torch.Tensor) -> torch.Tensor:
        result_1TH[0].index_copy_(0, self._places_M, self._rows_MH)
        return result_1TH


class OutputChange:
    """Computes some logits of some chosen tokens by other rows of the output layer."""

    def __init__(self, parts: Sequence[tuple[torch.Tensor, OutputRows]]) -> None:
        self._parts = parts

    def __call__(self, hidden_1NH: torch.Tensor, logits_1NV: torch.Tensor) -> torch.Tensor:
        for rows_M, replaced in self._parts:
            own_MK = linear(hidden_1NH[0].index_select(0, rows_M), replaced.rows_KH, replaced.bias_V)
            if replaced.ids_K is None:
                logits_1NV[0].index_copy_(0, rows_M, own_MK)
            else:
                logits_1NV[0][rows_M[:, None], replaced.ids_K] = own_MK
        return logits_1NV


def input_change(batch: StepBatch, adapters: Sequence[LoadedAdapter | None]) -> InputChange | None:
    """adapters: of each chunk. None: every token has the base's embedding."""
    places: list[int] = []
    rows: list[torch.Tensor] = []
    first = 0
    for chunk, weights in zip(batch.chunks, adapters, strict=True):
        if weights is not None:
            lead = weights.virtual_tokens.count if weights.virtual_tokens is not None else 0
            trained = min(max(lead - chunk.start, 0), len(chunk.ids)) if lead else 0
            if trained and weights.virtual_tokens is not None and weights.virtual_tokens.embeddings_NH is not None:
                places += range(first, first + trained)
                rows.append(weights.virtual_tokens.embeddings_NH[chunk.start : chunk.start + trained])
            if weights.inputs is not None:
                known, table = weights.inputs.places, weights.inputs.rows_KH
                hits = [(n, token) for n, token in enumerate(chunk.ids) if known is None or token in known]
                places += [first + n for n, _ in hits]
                rows.append(table[[token if known is None else known[token] for _, token in hits]])
        first += len(chunk.ids)
    if not places:
        return None
    return InputChange(torch.tensor(places, device=batch.ids_1T.device), torch.cat(rows))


def output_change(
    batch: StepBatch, adapters: Sequence[LoadedAdapter | None], wanted: Sequence[int]
) -> OutputChange | None:
    """wanted: packed places of the chosen tokens. None: all are chosen by the base's output layer."""
    rows: dict[LoadedAdapter, list[int]] = {}
    owners = [weights for chunk, weights in zip(batch.chunks, adapters, strict=True) for _ in chunk.ids]
    for n, place in enumerate(wanted):
        weights = owners[place]
        if weights is not None and weights.outputs is not None:
            rows.setdefault(weights, []).append(n)
    device = batch.ids_1T.device
    parts = [(torch.tensor(own, device=device), weights.outputs) for weights, own in rows.items() if weights.outputs]
    return OutputChange(parts) if parts else None
