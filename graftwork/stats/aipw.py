"""Scores of a randomised split whose mean is the effect, whatever the chances of the arms were and however they moved.

With a logged chance p of the arm, y - m in place of y where m was guessed from the past: psi = m1 - m0 + 1{arm 1}
(y - m1) / p - 1{arm 0} (y - m0) / (1 - p). Given the past its mean is the difference of the arms' means, for every m
(augmented inverse propensity weighting; Robins, Rotnitzky & Zhao 1994; in confidence sequences Waudby-Smith, Wu,
Ramdas, Karampatziakis & Mineiro 2024, "Anytime-valid off-policy inference for contextual bandits", section 2).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graftwork.stats.paired import Floats
from graftwork.stats.running import sums


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
