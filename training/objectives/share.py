"""Held-out rows dealt to the ranks."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def share(lengths_N: "NDArray[np.int64]", micro: int, rank: int, world: int) -> list[Sequence[int]]:
    """Batches of similar length that this rank scores: equally many on each, where there are rows enough.

    Under ZeRO-3 and FSDP2 every forward pass is one of all ranks, so none may have a batch more than another.
    """
    order = np.argsort(lengths_N, kind="stable")
    each = max(1, min(math.ceil(len(order) / (micro * world)), len(order) // world))
    batches: list[Sequence[int]] = [part.tolist() for part in np.array_split(order, each * world) if len(part)]
    return batches[rank::world]
