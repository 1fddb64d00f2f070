"""Intervals and tests for scores paired by question: all arms answer the same questions, so they differ per question.

Shares of answers (0/1): Wilson and Newcombe intervals, McNemar's exact test. Graded scores (0..1): BCa bootstrap,
sign-flip permutation. Equivalence by interval inclusion (TOST), and what n questions can detect.
Only numpy and scipy.special are used: scipy.stats takes a second to import. Resampling is seeded: the same scores give
the same numbers.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtr, ndtri, stdtr, stdtrit

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "equivalent", "undecided"]

POWER = 0.8
"""Chance of finding an effect, in every statement about what n questions detect or need."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int, alpha: float = 0.05) -> Interval:
    """Score interval of a share (Wilson 1927; eq. 4 in Brown, Cai, DasGupta 2001).

    At 0 and at n successes the outer bound is exactly 0 or 1, where the formula leaves a rounding error of 1e-18.
    """
    assert 0 <= successes <= n, f"{successes} successes of {n}"
    assert n > 0, "an interval needs at least one answer"
    z = normal_quantile(alpha)
    share, grow = successes / n, 1 + z * z / n
    center = (share + z * z / (2 * n)) / grow
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / grow
    low, high = max(0.0, center - half), min(1.0, center + half)
    return Interval(low if successes else 0.0, high if successes < n else 1.0)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact p that a win is as likely as a loss, ties ignored (McNemar 1947): binomial with p = 1/2."""
    if wins + losses == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def mcnemar_midp(wins: int, losses: int) -> float:
    """As `mcnemar_exact` with half of the chance of what was seen: nearer to its level, so with more power.

    Not guaranteed to hold its level, and not seen to leave it: Fagerland, Lydersen & Laake 2013, BMC Med Res Methodol
    13:91, over 9,595 settings.
    """
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    seen = float(bdtr(fewer, n, 0.5)) - (float(bdtr(fewer - 1, n, 0.5)) if fewer else 0.0)
    return min(1.0, 2 * float(bdtr(fewer, n, 0.5)) - seen)


def newcombe_paired(both: int, only_a: int, only_b: int, neither: int, alpha: float = 0.05) -> Interval:
    """Interval of share(a) - share(b) over the same questions: method 10 of Newcombe 1998, Stat Med 17:2635-2650."""
    n = both + only_a + only_b + neither
    a, b = (both + only_a) / n, (both + only_b) / n
    wilson_a, wilson_b = wilson(both + only_a, n, alpha), wilson(both + only_b, n, alpha)
    phi = _newcombe_phi(both, only_a, only_b, neither)
    down = _hypot_correlated(a - wilson_a.low, wilson_b.high - b, phi)
    up = _hypot_correlated(wilson_a.high - a, b - wilson_b.low, phi)
    return Interval(max(-1.0, a - b - down), min(1.0, a - b + up))


def newcombe_scores(a: Floats, b: Floats, alpha: float = 0.05) -> Interval:
    """As `newcombe_paired`, from the scores (0 or 1) of both on each question."""
    both, only_a, only_b = (int(np.sum(mask)) for mask in ((a > 0) & (b > 0), a > b, a < b))
    return newcombe_paired(both, only_a, only_b, len(a) - both - only_a - only_b, alpha)


def bca_mean(values: Floats, alpha: float = 0.05, *, lowest: float, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Interval of the mean of scores (`lowest=0`) or of differences (`lowest=-1`), at most 1.

    BCa bootstrap (Efron 1987; Efron & Tibshirani 1993, 14.3).

    Resamples are drawn as multinomial counts of the distinct values, which is the same distribution and takes memory
    for those only. Where all values are equal there is nothing to resample and the bootstrap would claim certainty;
    then the interval allows for one unseen value at distance 1, as often as Wilson allows for 0 of n.
    """
    distinct, counts = np.unique(values, return_counts=True)
    n, mean = len(values), float(np.mean(values))
    if len(distinct) == 1:
        reach = wilson(0, n, alpha).high
        return Interval(max(lowest, mean - reach), min(1.0, mean + reach))
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    means = np.sort(drawn @ distinct / n)
    observed = float(counts @ distinct / n)
    ties = 1e-12  # sums of the same values in another order differ in the last bit
    below = np.mean(means < observed - ties) + np.mean(np.abs(means - observed) <= ties) / 2
    z0 = float(ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples)))
    centered = distinct - observed
    acceleration = float(counts @ centered**3) / (6 * float(counts @ centered**2) ** 1.5)
    low, high = (bca_level(z0, acceleration, z) for z in (-normal_quantile(alpha), normal_quantile(alpha)))
    return Interval(float(np.quantile(means, low)), float(np.quantile(means, high)))


def sign_flip(differences: Floats, *, seed: int, resamples: int = RESAMPLES) -> float:
    """Two-sided p that the differences are symmetric about 0, by flipping their signs at random (Fisher 1935).

    (1 + hits) / (1 + resamples), so that it is valid and never 0 (Phipson & Smyth 2010).
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if len(sizes) == 0:
        return 1.0
    positive = np.random.default_rng(seed).binomial(counts, 0.5, size=(resamples, len(counts)))
    sums = np.abs((2 * positive - counts) @ sizes)
    hits = int(np.sum(sums >= abs(float(np.sum(differences))) - 1e-9))
    return (1 + hits) / (1 + resamples)


def equivalent(interval: Interval, margin: float) -> bool:
    """Two one-sided tests at alpha, as inclusion of the (1 - 2 alpha) interval in ±margin (Schuirmann 1987)."""
    return -margin < interval.low and interval.high < margin


def mde_binary(n: int, discordant: float, alpha: float = 0.05, power: float = POWER) -> float:
    """Smallest difference of shares that n questions find, when a share `discordant` of them tells the arms apart.

    Inverts `n_for_binary`, which falls with the difference, by bisection.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _n_binary(middle, discordant, alpha, power) <= n else (middle, high)
    return high


def n_for_binary(difference: float, discordant: float, alpha: float = 0.05, power: float = POWER) -> int:
    """Questions that find a difference of shares by McNemar's test (Connor 1987, Biometrics 43:207-211)."""
    return math.ceil(_n_binary(abs(difference), discordant, alpha, power))


def mde_graded(n: int, sd: float, alpha: float = 0.05, power: float = POWER) -> float:
    """Smallest mean difference that n questions find, at standard deviation `sd` of the differences (normal)."""
    return (normal_quantile(alpha) + float(ndtri(power))) * sd / math.sqrt(n)


def n_for_graded(difference: float, sd: float, alpha: float = 0.05, power: float = POWER) -> int:
    """Questions that find a mean difference; the inverse of `mde_graded`."""
    return math.ceil(((normal_quantile(alpha) + float(ndtri(power))) * sd / abs(difference)) ** 2)


def n_for_equivalence(difference: float, sd: float, margin: float, alpha: float = 0.05, power: float = POWER) -> int:
    """Questions that show a true difference within the margin to be so, by two one-sided tests at alpha (normal).

    Julious 2004, Stat Med 23:1921-1986, eq. 21, with the type II error split between the sides as for no difference.
    """
    room = margin - abs(difference)
    assert room > 0, f"{difference} is not within ±{margin}"
    return math.ceil(((float(ndtri(1 - alpha)) + float(ndtri((1 + power) / 2))) * sd / room) ** 2)


def decide(difference: float, p_adjusted: float, within_margin: bool, alpha: float, *, higher: bool = True) -> Verdict:
    """The verdict on a against b. A significant difference that is shown to be within the margin counts as none."""
    if within_margin:
        return "equivalent"
    if p_adjusted >= alpha or difference == 0:
        return "undecided"
    return "better" if (difference > 0) == higher else "worse"


def normal_quantile(alpha: float) -> float:
    """Half-width of a two-sided normal interval at level 1 - alpha, in standard errors."""
    assert 0 < alpha < 1, f"alpha={alpha} is not within 0..1"
    return float(ndtri(1 - alpha / 2))


def _newcombe_phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Correlation of the two shares; a positive one is shrunk by the continuity correction n / 2."""
    n = both + only_a + only_b + neither
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    cross = both * neither - only_a * only_b
    shrunk = max(cross - n / 2, 0.0) if cross > 0 else float(cross)
    return shrunk / math.sqrt(product) if product else 0.0


def _hypot_correlated(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def bca_level(z0: float, acceleration: float, z: float) -> float:
    """Level of the bootstrap distribution that corrects a normal quantile for bias and skew (Efron 1987, eq. 2.2)."""
    shifted = z0 + z
    return float(ndtr(z0 + shifted / (1 - acceleration * shifted)))


def _n_binary(difference: float, discordant: float, alpha: float, power: float) -> float:
    spread = max(discordant, difference)  # a difference of d needs at least a share d of discordant questions
    root = normal_quantile(alpha) * math.sqrt(spread) + float(ndtri(power)) * math.sqrt(
        max(0.0, spread - difference**2)
    )
    return (root / difference) ** 2


# Student's t, for a handful of nearly normal differences such as the losses of two configurations by seed.


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
