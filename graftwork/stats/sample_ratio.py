"""Do units fall to the arms as planned? A test that may be looked at after every unit.

The capital is the chance of the arms seen under a learned split over that under the plan: a Dirichlet mixture of
multinomials (Lindon & Malek 2022, "Anytime-valid inference for multinomial count data", NeurIPS, section 3), a
martingale from 1 when the plan holds. Where planned chances move, the learned split is the plan tilted by observed over
expected counts, which for a constant plan is the same mixture.
"""

import numpy as np
from numpy.typing import NDArray

from graftwork.stats.paired import Floats
from graftwork.stats.running import Products, sums

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
            factor = _over_arms(taken * tilt) / _over_arms(planned * tilt)
            total = total + weight * capital.times(factor)
        return total


def _over_arms(parts: Floats) -> Floats:
    """Sum over the last axis, one after another."""
    total: Floats = parts[..., 0]
    for k in range(1, parts.shape[-1]):
        total = total + parts[..., k]
    return total
