"""Tests of a mean that hold at every look: capital from fair bets grows only if the mean is not what was claimed.

If the next value has mean m given the past, each factor 1 + b (x - m) with b chosen from the past has mean 1, so the
capital is a nonnegative martingale from 1 and reaches 1 / alpha with chance alpha at most (Ville 1939; Waudby-Smith &
Ramdas 2024, JRSS B 86:1-27, propositions 2 and 3). All m that are not yet refuted are a confidence sequence (theorem 1
there). No approximation: it holds for every n and every distribution within the bounds.

The bet: a mixture over effects e of the bet that grows fastest for an effect e at the spread seen so far, e / (v + e^2)
(the aGRAPA form of their section B.3, with e in place of the plug-in estimate), cut so that no value loses more than
three quarters of the capital. A mixture of martingales is one. Effects are in units of the range. One direction at a
time, each with half of alpha: capital that bets on "above" falls with m, so what is refuted are the ends of the range.
"""

import numpy as np

from graftwork.stats.paired import Floats
from graftwork.stats.running import Products

EFFECTS = (0.0015, 0.005, 0.015, 0.045, 0.1, 0.3)
EFFECT_WEIGHTS = (0.05, 0.08, 0.15, 0.35, 0.31, 0.06)
"""Most weight where a few thousand units decide; the small ones are for logs of millions (see docs/log.md)."""
PLAIN_DEVIATION = 0.75
"""Where values deviate less from their mean, effects are taken as smaller in proportion."""
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
