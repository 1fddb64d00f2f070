"""Few differences that are near to normal, such as losses of two configurations over a handful of seeds."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from graftwork.stats.paired import Floats, Interval


@dataclass(frozen=True)
class StudentMean:
    """A mean, its interval, and how likely so large a one is where the true one is 0."""

    mean: float
    interval: Interval
    p_value: float


def student_mean(differences: Floats, alpha: float = 0.05) -> StudentMean:
    """Student's t on paired differences, at least two (Student 1908). Equal differences leave no doubt."""
    n = len(differences)
    assert n >= 2, f"{n} differences have no spread"
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, 1 - alpha / 2)) * error
    p_value = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return StudentMean(mean, Interval(mean - half, mean + half), p_value)
