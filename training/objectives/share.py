"""Held-out rows dealt to the ranks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def share(lengths_N: "NDArray[np.int64]", micro: int, rank: int, world: int) -> list[Sequence[int]]:
    """Batches of similar length that this rank scores."""
    order = np.argsort(lengths_N, kind="stable").tolist()
    batches: list[Sequence[int]] = [order[i : i + micro] for i in range(0, len(order), micro)]
    return batches[rank::world]
