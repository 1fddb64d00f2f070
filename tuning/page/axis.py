"""A key of the space as an axis: where a value lies, in which cell of a table, and the functions that a surface is
fitted with."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graftwork.report import words
from graftwork.report.sweep_records import Plain, SweepKey

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
BINS = 6
"""Cells of a range."""
MOST_VALUES = 12
"""A choice of more is no axis of a table."""


def is_number(value: Plain) -> bool:
    """True and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric(key: SweepKey) -> bool:
    """Every value is a number."""
    return not key.values or all(is_number(value) for value in key.values)


def number(value: Plain) -> float:
    """A value that is one."""
    assert isinstance(value, int | float), f"{value!r} is no number"
    return float(value)


def logarithmic(key: SweepKey) -> bool:
    """A log range, or positive choices that span a factor of four."""
    if not key.values:
        return key.log
    if not numeric(key):
        return False
    low, high = min(map(number, key.values)), max(map(number, key.values))
    return low > 0 and high / low >= 4


class Cells:
    """A key cut into the rows or columns of a table: the values of a choice in rising order, equal parts of a range,
    named by their middles."""

    def __init__(self, key: SweepKey) -> None:
        self.key = key
        if key.values:
            self._listed = sorted(key.values, key=number) if numeric(key) else list(key.values)
            self.labels = tuple(words.format_setting(value) for value in self._listed)
            self.centres = tuple(number(value) for value in self._listed) if numeric(key) else ()
            return
        assert key.low is not None
        assert key.high is not None
        at = (math.log, math.exp) if key.log else (float, float)
        low, high = at[0](key.low), at[0](key.high)
        self._edges = [at[1](low + (high - low) * part / BINS) for part in range(BINS + 1)]
        self.centres = tuple(at[1](low + (high - low) * (part + 0.5) / BINS) for part in range(BINS))
        self.labels = tuple(f"{centre:.2g}" for centre in self.centres)

    def index(self, value: Plain) -> int:
        """The cell of a value."""
        if self.key.values:
            return self._listed.index(value)
        return min(max(int(np.searchsorted(self._edges, number(value), side="right")) - 1, 0), BINS - 1)


def terms(key: SweepKey, values: Sequence[Plain]) -> Floats:
    """(trials, functions): a line and a parabola of a number, contrasts of other choices. They are orthonormal and of
    mean 0 when the key is drawn evenly from its domain, so that squared coefficients are shares of the variance."""
    if not key.values:
        u = np.array([_unit(key, value) for value in values])
        return np.column_stack([math.sqrt(3) * (2 * u - 1), math.sqrt(5) * (6 * u * u - 6 * u + 1)])
    listed = list(key.values)
    if numeric(key):
        at = np.array([math.log(number(v)) if logarithmic(key) else number(v) for v in listed])
        at = (at - at.mean()) / (at.std() or 1.0)
        raw = np.column_stack([np.ones(len(at)), at, at * at][: min(3, len(listed))])
    else:
        raw = np.column_stack([np.ones(len(listed)), np.eye(len(listed))[:, 1:]])
    orthonormal = np.linalg.qr(raw)[0][:, 1:] * math.sqrt(len(listed))
    table: Floats = orthonormal[[listed.index(value) for value in values]]
    return table


def _unit(key: SweepKey, value: Plain) -> float:
    assert key.low is not None
    assert key.high is not None
    low, high, at = key.low, key.high, number(value)
    if key.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)
