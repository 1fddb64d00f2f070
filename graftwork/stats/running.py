"""Sums and products over a log that may be cut anywhere: a block of rows leaves the very bits that single rows leave.

Sums are added one after another, never pairwise. Products hold a mantissa and a power of two, so that bringing one back
into range is exact, whenever it is done.
"""

import numpy as np
from numpy.typing import NDArray

from graftwork.stats.paired import Floats

BLOCK = 1024
"""Rows taken at once."""
_FAR = 2.0**900
"""A product within 1 / _FAR.._FAR has lost no bit to the range of a double."""


def sums(start: Floats, steps: Floats) -> tuple[Floats, Floats]:
    """Running sums along the first axis (before, after each step); `start` is the sum so far, `after[-1]` the new."""
    path = np.add.accumulate(np.concatenate([start[None], steps]), axis=0)
    return path[:-1], path[1:]


class Products:
    """Running products, one for each entry of `shape`, all 1 at first."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._mantissa: Floats = np.full(shape, 0.5)
        self._exponent: NDArray[np.int64] = np.ones(shape, dtype=np.int64)

    def times(self, factors: Floats, entries: slice | None = None) -> Floats:
        """The products after each of at most `BLOCK` factors, which lie along the first axis.

        Only the `entries` of the last axis are multiplied, where given. A product beyond the range of a double is
        returned as inf or 0, and is remembered rightly.
        """
        assert 0 < len(factors) <= BLOCK, f"{len(factors)} factors at once"
        part = ... if entries is None else (..., entries)
        exponent = self._exponent[part]
        with np.errstate(over="ignore", under="ignore"):
            path = np.multiply.accumulate(np.concatenate([self._mantissa[part][None], factors]), axis=0)[1:]
            if len(factors) > 1 and not (np.min(path) > 1 / _FAR and np.max(path) < _FAR):
                half = len(factors) // 2
                return np.concatenate([self.times(factors[:half], entries), self.times(factors[half:], entries)])
            found: Floats = np.ldexp(path, exponent)
        self._mantissa[part], moved = np.frexp(path[-1])
        self._exponent[part] = exponent + moved
        return found
