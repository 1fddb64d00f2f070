"""Confidence sequences: intervals that cover the mean at all n at once, so that one may look after every value."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from graftwork.stats.betting import MeanTest
from graftwork.stats.paired import POWER, Floats
from graftwork.stats.running import sums


@dataclass(frozen=True)
class SequentialEvidence:
    """What a sequence says at one n."""

    n: int
    total: float
    squares: float
    low: float
    high: float
    e_value: float
    """Largest so far against a mean of 0; 1 / alpha decides."""

    @property
    def estimate(self) -> float | None:
        """Mean of the values so far."""
        return self.total / self.n if self.n else None

    @property
    def variance(self) -> float | None:
        """Of the values so far; None before there are some that differ."""
        spread = self.squares / self.n - (self.total / self.n) ** 2 if self.n else 0.0
        return spread if spread > 0 else None


def units_to_show(gap: float, variance: float, alpha: float) -> int:
    """Values after which a sequence shuts out what lies `gap` from the true mean, in 80 % of runs.

    By the half-width of `AsymptoticSequence` at its tightest, and the normal spread of the estimate.
    """
    n = 1
    while _half(n, variance, alpha, _ratio(alpha, n)) + float(ndtri(POWER)) * math.sqrt(variance / n) > gap:
        n = math.ceil(n * 1.05)
    return n


def _ratio(alpha: float, tightest: int) -> float:
    return (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / tightest


def _half(n: int, variance: float, alpha: float, ratio: float) -> float:
    grown = n * ratio + 1
    return math.sqrt(variance * 2 * grown / (n * n * ratio) * math.log(math.sqrt(grown) / alpha))


class BettingSequence:
    """Confidence sequence of a mean within -1..1, by betting against a grid of means.

    The grid's step is 0.001 up to 0.03, 0.0025 up to 0.1, then 0.01 and 0.05.
    Both ends stand at a refuted grid point, so they hold for every mean between (see `betting`). `extra` means are put
    on the grid, so that they are decided exactly.
    """

    def __init__(self, alpha: float, extra: tuple[float, ...] = ()) -> None:
        side = [
            *np.arange(0, 31) / 1000,
            *np.arange(13, 41) / 400,
            *np.arange(11, 30) / 100,
            *np.arange(6, 20) / 20,
            *map(abs, extra),
        ]
        grid = np.unique(np.concatenate([side, np.negative(side)]))
        self.bound = 2 / alpha
        self._test, self._none = MeanTest(grid), MeanTest(np.zeros(1))
        self._first, self._last = 0, len(grid) - 1
        self._n, self._sums, self._most = 0, np.zeros(2), 0.5

    def update(self, values: Floats, low: Floats, high: Floats, spread: Floats) -> None:
        """Take at most `BLOCK` values with bounds and spread from before each (see `MeanTest`); all are vectors."""
        x, least, most, square = (part[:, None] for part in (values, low, high, spread))
        above, below = self._none.update(x, least, most, square)
        self._most = max(self._most, float(np.max(above)) / 2, float(np.max(below)) / 2)
        if self._first <= self._last:
            live = slice(self._first, self._last + 1)
            above, below = self._test.update(x, least, most, square, live)
            self._first += int(np.sum(np.any(above >= self.bound, axis=0)))
            self._last -= int(np.sum(np.any(below >= self.bound, axis=0)))
        self._n += len(values)
        self._sums = sums(self._sums, np.stack([values, values * values], axis=1))[1][-1]

    @property
    def evidence(self) -> SequentialEvidence:
        """Where it stands. No mean left (drift, or bad luck once in 1 / alpha): the last two that were refuted."""
        ends = [-1.0, *map(float, self._test.nulls), 1.0]
        low, high = sorted((ends[self._first], ends[self._last + 2]))
        return SequentialEvidence(self._n, float(self._sums[0]), float(self._sums[1]), low, high, self._most)


class AsymptoticSequence:
    """Confidence sequence of a mean of unbounded values, in the limit of many: tokens, cost, log latency.

    Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024 (Ann Stat 52:2613-2640), theorem 2.2: mean ± sd sqrt(2 (n r^2 +
    1) / (n^2 r^2) log(sqrt(n r^2 + 1) / alpha)), tightest near n = 1,000 by their eq. (11). Starts at n = 100. The
    e-value is the normal mixture that crosses 1 / alpha where 0 leaves the interval.
    """

    START = 100
    TIGHTEST = 1000

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._ratio = _ratio(alpha, self.TIGHTEST)
        self._sums, self._n = np.zeros(2), 0
        self._low, self._high, self._most = -math.inf, math.inf, 0.0

    def update(self, values: Floats) -> None:
        """Take some values (a vector)."""
        _, path = sums(self._sums, np.stack([values, values * values], axis=1))
        n = self._n + np.arange(1, len(values) + 1)
        total, squares = path[:, 0], path[:, 1]
        self._sums, self._n = path[-1], int(n[-1])
        variance = squares / n - (total / n) ** 2
        told = (n >= self.START) & (variance > 0)
        if not np.any(told):
            return
        n, total, variance = n[told], total[told], variance[told]
        grown = n * self._ratio + 1
        half = np.sqrt(variance * 2 * grown / (n * n * self._ratio) * np.log(np.sqrt(grown) / self.alpha))
        exponent = np.minimum(total * total / variance * self._ratio / (2 * grown), 700.0)
        self._most = max(self._most, float(np.max(np.exp(exponent) / np.sqrt(grown))))
        self._low = max(self._low, float(np.max(total / n - half)))
        self._high = min(self._high, float(np.min(total / n + half)))

    @property
    def evidence(self) -> SequentialEvidence:
        """Where it stands; no interval before n = 100."""
        low, high = min(self._low, self._high), max(self._low, self._high)
        return SequentialEvidence(self._n, float(self._sums[0]), float(self._sums[1]), low, high, self._most)
