"""Inputs of a decode step in device memory at fixed addresses, written by one copy a step.

A captured graph holds addresses, not values. Everything a step depends on (tokens, places of their KV, adapters) is
read from this buffer, and a batch is padded up to the graph's rows: padding has length 0 and stands in no tile.
Legend: N rows of the graph, T tiles (at most N).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftwork.serving.engine.attention import Chunk
from graftwork.serving.engine.cuda.lora import ROWS, Tiles, tiled

_IDS, _POSITIONS, _STARTS, _CAPS, _LENGTHS, _SLOTS, _ROWS = range(7)
_LINES = _ROWS + ROWS


@dataclass(frozen=True)
class StaticInputs:
    """Where each request's KV lies, [N] each: first token of its row in the arena, room of the row, tokens in it.

    Head h, position p of a request is line `start * heads + h * cap + p` of a layer's arena (see `kv.py`). `lengths`
    counts the step's own token; 0 is padding.
    """

    starts: torch.Tensor
    caps: torch.Tensor
    lengths: torch.Tensor


class StepInputs:
    """One pinned buffer on the host and its image on the device, int64 [7 lines + tiles, rows]."""

    def __init__(self, rows: int, page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._host = torch.zeros(_LINES, rows, dtype=torch.long, pin_memory=device.type == "cuda")
        self._device = torch.zeros(_LINES, rows, dtype=torch.long, device=device)
        self.fill([], [], rows)

    def ids_1N(self, rows: int) -> torch.Tensor:
        return self._device[_IDS, :rows][None]

    def positions_1N(self, rows: int) -> torch.Tensor:
        return self._device[_POSITIONS, :rows][None]

    def places(self, rows: int) -> StaticInputs:
        return StaticInputs(*(self._device[line, :rows] for line in (_STARTS, _CAPS, _LENGTHS)))

    def tiles(self, rows: int) -> Tiles:
        return Tiles(self._device[_SLOTS, :rows], self._device[_ROWS:].view(-1, ROWS)[:rows])

    def fill(self, chunks: Sequence[Chunk], slots: Sequence[int], rows: int) -> None:
        """Writes one step: each chunk's single token and KV place, each token's slot (-1: base), padded to `rows`.

        The copy is ordered on the current stream. The host's half is written again only after the step's tokens came
        back, which is after this copy.
        """
        host, pad = self._host.numpy(), [0] * (rows - len(chunks))
        kept = [chunk.row for chunk in chunks if chunk.row is not None]
        assert len(kept) == len(chunks), "a decoding request has a KV row"
        host[_IDS, :rows] = [chunk.ids[0] for chunk in chunks] + pad
        host[_POSITIONS, :rows] = [chunk.start for chunk in chunks] + pad
        host[_STARTS, :rows] = [row.page * self._page_tokens + row.index * row.cap for row in kept] + pad
        host[_CAPS, :rows] = [row.cap for row in kept] + pad
        host[_LENGTHS, :rows] = [chunk.start + 1 for chunk in chunks] + pad
        host[_SLOTS, :rows] = -1
        tile_rows = host[_ROWS:].reshape(-1, ROWS)
        for number, (slot, own) in enumerate(tiled(slots)):
            host[_SLOTS, number] = slot
            tile_rows[number] = own + [-1] * (ROWS - len(own))
        self._device.copy_(self._host, non_blocking=True)
