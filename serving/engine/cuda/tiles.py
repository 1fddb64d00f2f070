"""Groups the tokens of a decode step into tiles of one adapter each, for the LoRA kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROWS = 16
"""Tokens of a tile at most: the smallest tile of a tensor core's matmul. A tile with one token costs no more memory."""


@dataclass(frozen=True)
class Tiles:
    """Device tensors. slots: [tiles], the adapter's slot or -1; rows: [tiles, ROWS], packed tokens or -1."""

    slots: torch.Tensor
    rows: torch.Tensor


def tiled(slots: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(slot, its tokens) of each tile, from the slot of every token; -1 (the base) is in no tile.

    There are never more tiles than tokens, so that a grid of one tile a token is always enough.
    """
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    return [(slot, own[first : first + ROWS]) for slot, own in rows.items() for first in range(0, len(own), ROWS)]
