"""Inference over clusters and over families of tests: cluster bootstrap, Holm, Benjamini-Hochberg, tied sets.

Questions that share a document, a user or a template are not independent: whole clusters are drawn and flipped.
The estimate stays the mean over questions; only its uncertainty is the clusters' (Miller 2024, arXiv 2411.00640,
section 2.2).
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from graftwork.stats.paired import RESAMPLES, Floats, Interval, bca_level, sign_flip, wilson

_DRAWN_AT_ONCE = 2_000_000
"""Counts held at a time (int64: 16 MB)."""


def cluster_bootstrap(
    values: Floats,
    clusters: Sequence[Hashable],
    alpha: float = 0.05,
    *,
    lowest: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of the mean of scores (`lowest=0`) or of differences (`lowest=-1`), at most 1, drawing whole clusters.

    `clusters[i]` is the cluster of `values[i]`. BCa with the jackknife over clusters (Efron 1987; Field & Welsh 2007,
    JRSS B 69:369-390), at the levels of Hesterberg's expanded percentiles (2015, Am Stat 69:371-386): t with
    K - 1 degrees of freedom and sqrt(K / (K - 1)) for K clusters, without which few clusters give too short intervals.
    Clusters that all have the same mean leave nothing to resample: then as `bca_mean`, with n = K.
    """
    sums, sizes = cluster_sums(values, clusters)
    count, mean = len(sums), float(np.sum(values) / len(values))
    if count < 2 or np.ptp(sums / sizes) < 1e-12:
        reach = wilson(0, count, alpha).high
        return Interval(max(lowest, mean - reach), min(1.0, mean + reach))
    means = np.sort(_resample_means(sums, sizes, seed, resamples))
    below = np.mean(means < mean - 1e-12) + np.mean(np.abs(means - mean) <= 1e-12) / 2
    z0 = float(ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples)))
    left_out = (np.sum(sums) - sums) / (np.sum(sizes) - sizes)
    skew = np.mean(left_out) - left_out
    acceleration = float(np.sum(skew**3) / (6 * np.sum(skew**2) ** 1.5)) if np.any(skew) else 0.0
    wide = math.sqrt(count / (count - 1)) * float(stdtrit(count - 1, 1 - alpha / 2))
    low, high = (float(np.quantile(means, _level(z0, acceleration, z))) for z in (-wide, wide))
    return Interval(max(lowest, low), min(1.0, high))


def cluster_sign_flip(
    differences: Floats, clusters: Sequence[Hashable], *, seed: int, resamples: int = RESAMPLES
) -> float:
    """Two-sided p that no cluster's sum of differences leans either way: all of a cluster are flipped together."""
    sums, _ = cluster_sums(differences, clusters)
    return sign_flip(sums, seed=seed, resamples=resamples)


def cluster_sums(values: Floats, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """(sum, size) of each cluster, in the order in which they first appear."""
    assert len(values) == len(clusters) > 0, f"{len(values)} values in {len(clusters)} clusters' labels"
    numbers: dict[Hashable, int] = {}
    index: NDArray[np.intp] = np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.intp)
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)


def _resample_means(sums: Floats, sizes: Floats, seed: int, resamples: int) -> Floats:
    """Means over drawn clusters, a few resamples at a time."""
    rng, count = np.random.default_rng(seed), len(sums)
    step, found = max(1, _DRAWN_AT_ONCE // count), []
    for start in range(0, resamples, step):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        found.append((drawn @ sums) / (drawn @ sizes))
    return np.concatenate(found)


def _level(z0: float, acceleration: float, z: float) -> float:
    """`bca_level`, kept to the side of z where a long way out and a strong skew would turn it round."""
    if acceleration * (z0 + z) >= 1:
        return float(ndtr(math.inf if z > 0 else -math.inf))
    return bca_level(z0, acceleration, z)


# Families of tests: adjusted p-values, and groups of arms in place of a ranking that the tests do not support.


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being tested together (Holm 1979): reject where the adjusted one is below alpha."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that at most a share alpha of what lies below it is false (Benjamini & Hochberg 1995).

    For slices, where a false alarm among many findings costs little; claims take `holm`.
    """
    adjusted, lowest, count = [0.0] * len(p_values), 1.0, len(p_values)
    order = sorted(range(count), key=p_values.__getitem__, reverse=True)
    for rank, index in zip(range(count, 0, -1), order, strict=True):
        lowest = min(lowest, count / rank * p_values[index])
        adjusted[index] = lowest
    return adjusted


def tied_sets(means: Mapping[str, float], apart: Collection[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The largest groups of arms no two of which the tests tell apart, best mean first; `apart`: the pairs they do.

    An arm may stand in several groups: not told apart is not transitive. Insert-and-absorb of compact letter displays
    (Piepho 2004, J Comput Graph Stat 13:456-466).
    """
    unknown = {arm for pair in apart for arm in pair} - set(means)
    assert not unknown, f"no mean of {sorted(unknown)}"
    groups = [frozenset(means)] if means else []
    for pair in apart:
        split = [part for group in groups for part in _split_group(group, *pair)]
        groups = [one for one in dict.fromkeys(split) if not any(one < other for other in split)]
    ordered = [tuple(sorted(group, key=lambda arm: (-means[arm], arm))) for group in groups]
    return sorted(ordered, key=lambda group: [(-means[arm], arm) for arm in group])


def _split_group(group: frozenset[str], a: str, b: str) -> list[frozenset[str]]:
    return [group - {a}, group - {b}] if a != b and {a, b} <= group else [group]
