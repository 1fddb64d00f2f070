"""Sequential inference: confidence sequences that cover the mean at all n at once, bounds and sample ratio tests."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from graftwork.stats.paired import POWER, Floats

# Scores of a randomised split whose mean is the effect, whatever the chances of the arms were and however they moved.
#
# With a logged chance p of the arm, y - m in place of y where m was guessed from the past: psi = m1 - m0 + 1{arm 1}
# (y - m1) / p - 1{arm 0} (y - m0) / (1 - p). Given the past its mean is the difference of the arms' means, for every m
# (augmented inverse propensity weighting; Robins, Rotnitzky & Zhao 1994; in confidence sequences Waudby-Smith, Wu,
# Ramdas, Karampatziakis & Mineiro 2024, "Anytime-valid off-policy inference for contextual bandits", section 2).


@dataclass(frozen=True)
class Scored:
    """Scores with what was known before each: bounds, expected square about the mean."""

    values: Floats
    low: Floats
    high: Floats
    spread: Floats


class SplitScores:
    """From outcomes in 0..1 of two arms. The guess m is the arm's mean so far with one pseudo-outcome of 1/2."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self._sums: Floats = np.zeros((6, *shape))
        self._sums[:2], self._sums[2:4], self._sums[4:] = 0.5, 1.0, 0.25

    def update(self, treated: NDArray[np.bool_], outcomes: Floats, chance: Floats) -> Scored:
        """Rows along the first axis; `chance` is that of the treated arm before the draw, within 0..1, ends excluded.

        The guess of the spread is each arm's mean square about its guesses.
        """
        one, none = treated.astype(np.float64), (~treated).astype(np.float64)
        steps = np.stack([one * outcomes, none * outcomes, one, none], axis=1)
        before, after = sums(self._sums[:4], steps)
        m1, m0 = before[:, 0] / before[:, 2], before[:, 1] / before[:, 3]
        off1, off0 = one * (outcomes - m1), none * (outcomes - m0)
        squares, latest = sums(self._sums[4:], np.stack([off1 * off1, off0 * off0], axis=1))
        self._sums = np.concatenate([after[-1], latest[-1]])
        rest, gap = 1 - chance, m1 - m0
        spread = squares[:, 0] / before[:, 2] / chance + squares[:, 1] / before[:, 3] / rest
        return Scored(
            values=gap + off1 / chance - off0 / rest,
            low=gap - np.maximum(m1 / chance, (1 - m0) / rest),
            high=gap + np.maximum((1 - m1) / chance, m0 / rest),
            spread=spread,
        )


class UnboundedSplitScores:
    """As `SplitScores` for outcomes without bounds; the first ten of each arm only tell where outcomes lie."""

    FIRST = 10

    def __init__(self) -> None:
        self._sums: Floats = np.zeros(4)

    def update(self, treated: NDArray[np.bool_], outcomes: Floats, chance: Floats) -> Floats:
        """Scores of the rows past the first ones; all vectors."""
        one, none = treated.astype(np.float64), (~treated).astype(np.float64)
        before, after = sums(self._sums, np.stack([one * outcomes, none * outcomes, one, none], axis=1))
        self._sums = after[-1]
        m1, m0 = (before[:, k] / np.maximum(before[:, k + 2], 1) for k in range(2))
        values = m1 - m0 + one * (outcomes - m1) / chance - none * (outcomes - m0) / (1 - chance)
        found: Floats = values[(before[:, 2] >= self.FIRST) & (before[:, 3] >= self.FIRST)]
        return found


class PairScores:
    """Differences of two arms on the same prompts, within -1..1 (a shadow); the spread is their mean square."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self._sums: Floats = np.zeros((2, *shape))
        self._sums[0], self._sums[1] = 2.5, 10.0

    def update(self, differences: Floats) -> Scored:
        """Rows along the first axis."""
        before, after = sums(self._sums, np.stack([differences**2, np.ones(differences.shape)], axis=1))
        self._sums = after[-1]
        bound = np.ones(differences.shape)
        return Scored(differences, -bound, bound, before[:, 0] / before[:, 1])


# Tests of a mean that are valid at every look: capital from fair bets grows only if the hypothesis is false.
#
# If the next value has mean m given the past, each factor 1 + b (x - m) with b chosen from the past has mean 1, so the
# capital is a nonnegative martingale from 1 and reaches 1 / alpha with chance alpha at most (Ville 1939; Waudby-Smith &
# Ramdas 2024, JRSS B 86:1-27, propositions 2 and 3). All m that are not yet refuted are a confidence sequence (theorem
# 1 there). No approximation: it holds for every n and every distribution within the bounds.
#
# The bet: a mixture over effects e of the bet that grows fastest for an effect e at the spread seen so far, e / (v +
# e^2) (the aGRAPA form of their section B.3, with e in place of the plug-in estimate), cut so that no value loses more
# than three quarters of the capital. A mixture of martingales is one. Effects are in units of the range. One direction
# at a time, each with half of alpha: capital that bets on "above" falls with m, so what is refuted are the ends of the
# range.


EFFECTS = (0.0015, 0.005, 0.015, 0.045, 0.1, 0.3)
EFFECT_WEIGHTS = (0.05, 0.08, 0.15, 0.35, 0.31, 0.06)
"""Most weight where a few thousand units decide; the small ones are for logs of millions (see docs/log.md)."""
PLAIN_DEVIATION = 0.75
"""Lower bound: where values deviate less from their mean, effects are taken as smaller in proportion."""
LARGEST_STAKE = 0.75
"""Share of the capital that a bet may lose."""


class MeanTest:
    """Capital against each of `nulls`, on the mean being above it and on its being below."""

    def __init__(self, nulls: Floats, shape: tuple[int, ...] | None = None) -> None:
        """`shape`: where several sequences of values are followed at once; its last axis is that of the nulls."""
        self.nulls = nulls
        whole = nulls.shape if shape is None else shape
        self._above, self._below = ([Products(whole) for _ in EFFECTS] for _ in range(2))

    def update(
        self, values: Floats, low: Floats, high: Floats, spread: Floats, entries: slice | None = None
    ) -> tuple[Floats, Floats]:
        """Capital (betting above, below) after each value.

        Arguments have the rows along the first axis and broadcast against the nulls of `entries`. `low` and `high`
        bound the value, `spread` is its expected square about the mean: all three from before the value.
        """
        nulls = self.nulls if entries is None else self.nulls[entries]
        gain, most_above, most_below = values - nulls, LARGEST_STAKE / (nulls - low), LARGEST_STAKE / (high - nulls)
        scale = np.minimum(np.sqrt(spread) / PLAIN_DEVIATION, 1.0)
        above, below = np.zeros(gain.shape), np.zeros(gain.shape)
        for k, (effect, weight) in enumerate(zip(EFFECTS, EFFECT_WEIGHTS, strict=True)):
            likely = effect * scale
            bet = likely / (spread + likely * likely)
            above = above + weight * self._above[k].times(1 + np.minimum(bet, most_above) * gain, entries)
            below = below + weight * self._below[k].times(1 - np.minimum(bet, most_below) * gain, entries)
        return above, below


class LimitTest:
    """Capital against "the mean of values in 0..1 is at most the limit", for a guardrail: it bets on more alone.

    A mixture over fixed larger shares q: for a share of answers the factor is q / limit or (1 - q) / (1 - limit), the
    likelihood ratio. Holds for answers that depend on each other: the limit bounds the chance given the past.
    """

    ODDS = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0)

    def __init__(self, limit: float, shape: tuple[int, ...] = ()) -> None:
        self.limit = limit
        shares = [ratio * limit / (1 - limit + ratio * limit) for ratio in self.ODDS]
        self._bets = [(share - limit) / (limit * (1 - limit)) for share in shares]
        self._capital = [Products(shape) for _ in self.ODDS]

    def update(self, values: Floats) -> Floats:
        """Capital after each value; rows along the first axis."""
        total = np.zeros(values.shape)
        for bet, capital in zip(self._bets, self._capital, strict=True):
            total = total + capital.times(1 + bet * (values - self.limit))
        return total / len(self.ODDS)


@dataclass(frozen=True)
class SequentialEvidence:
    """Evidence of a sequence at one n."""

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
    while _half_width(n, variance, alpha, _ratio(alpha, n)) + float(ndtri(POWER)) * math.sqrt(variance / n) > gap:
        n = math.ceil(n * 1.05)
    return n


def _ratio(alpha: float, tightest: int) -> float:
    return (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / tightest


def _half_width(n: int, variance: float, alpha: float, ratio: float) -> float:
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
        """Evidence so far. No mean left (drift, or bad luck once in 1 / alpha): the last two that were refuted."""
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
        valid = (n >= self.START) & (variance > 0)
        if not np.any(valid):
            return
        n, total, variance = n[valid], total[valid], variance[valid]
        grown = n * self._ratio + 1
        half = np.sqrt(variance * 2 * grown / (n * n * self._ratio) * np.log(np.sqrt(grown) / self.alpha))
        exponent = np.minimum(total * total / variance * self._ratio / (2 * grown), 700.0)
        self._most = max(self._most, float(np.max(np.exp(exponent) / np.sqrt(grown))))
        self._low = max(self._low, float(np.max(total / n - half)))
        self._high = min(self._high, float(np.min(total / n + half)))

    @property
    def evidence(self) -> SequentialEvidence:
        """Evidence so far; no interval before n = 100."""
        low, high = min(self._low, self._high), max(self._low, self._high)
        return SequentialEvidence(self._n, float(self._sums[0]), float(self._sums[1]), low, high, self._most)


# Sums and products over a log that may be cut anywhere: a block of rows leaves the very bits that single rows leave.
#
# Sums are added one after another, never pairwise. Products hold a mantissa and a power of two, so that bringing one
# back into range is exact, whenever it is done.


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


# Sample ratio mismatch: a test, valid after every unit, that the arms get their planned shares.
#
# The capital is the chance of the arms seen under a learned split over that under the plan: a Dirichlet mixture of
# multinomials (Lindon & Malek 2022, "Anytime-valid inference for multinomial count data", NeurIPS, section 3), a
# martingale from 1 when the plan holds. Where planned chances move, the learned split is the plan tilted by observed
# over expected counts, which for a constant plan is the same mixture.


PRIOR_UNITS = (5000.0, 50.0)
"""Units that the plan weighs before the first is seen: many, for small shifts; few, for gross ones."""
PRIOR_WEIGHTS = (0.8, 0.2)


class SampleRatio:
    """`planned`: chances of the arms at the start, along the last axis; `shape`: of sequences followed at once."""

    def __init__(self, planned: Floats, shape: tuple[int, ...] = ()) -> None:
        self._prior: Floats = np.maximum(planned, 1e-6)
        self._seen: Floats = np.zeros((*shape, len(planned)))
        self._expected: Floats = np.zeros((*shape, len(planned)))
        self._capital = [Products(shape) for _ in PRIOR_UNITS]

    def update(self, arms: NDArray[np.intp], planned: Floats) -> Floats:
        """Capital after each unit. `arms`: its arm's number; `planned`: all chances at its draw, on the last axis."""
        taken = (arms[..., None] == np.arange(planned.shape[-1])).astype(np.float64)
        seen, seen_after = sums(self._seen, taken)
        expected, expected_after = sums(self._expected, planned)
        self._seen, self._expected = seen_after[-1], expected_after[-1]
        total = np.zeros(arms.shape)
        for units, weight, capital in zip(PRIOR_UNITS, PRIOR_WEIGHTS, self._capital, strict=True):
            tilt = (units * self._prior + seen) / (units * self._prior + expected)
            factor = _sum_arms(taken * tilt) / _sum_arms(planned * tilt)
            total = total + weight * capital.times(factor)
        return total


def _sum_arms(parts: Floats) -> Floats:
    """Sum over the last axis, one after another."""
    total: Floats = parts[..., 0]
    for k in range(1, parts.shape[-1]):
        total = total + parts[..., k]
    return total
