"""Tests made together, clusters and preferences against statsmodels, scipy and published tables."""

import math

import numpy as np
import pytest
import scipy.optimize
import statsmodels.api as sm
from statsmodels.stats.multitest import multipletests

from graftwork import stats
from graftwork.stats import Floats, Preference
from graftwork.stats.multiple import cluster_sums
from graftwork.stats.preference import Outcome, davidson

TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
WON = (
    (0, 7, 9, 7, 7, 9, 11),
    (6, 0, 7, 5, 11, 9, 9),
    (4, 6, 0, 7, 7, 8, 12),
    (6, 8, 6, 0, 6, 7, 10),
    (6, 2, 6, 7, 0, 7, 12),
    (4, 4, 5, 6, 6, 0, 6),
    (2, 4, 1, 3, 1, 7, 0),
)


def clustered(clusters: int, size: int, seed: int, shift: float = 0.0) -> tuple[Floats, list[int]]:
    """Differences whose clusters share half of their variance, within -1..1."""
    rng = np.random.default_rng(seed)
    shared = np.repeat(rng.uniform(-0.4, 0.4, clusters), size)
    return shared + rng.uniform(-0.4, 0.4, clusters * size) + shift, [k for k in range(clusters) for _ in range(size)]


def test_benjamini_hochberg_is_statsmodels() -> None:
    for seed in range(20):
        p_values = list(np.random.default_rng(seed).uniform(0, 0.2, size=1 + seed % 7))
        assert stats.benjamini_hochberg(p_values) == pytest.approx(list(multipletests(p_values, method="fdr_bh")[1]))
    assert stats.benjamini_hochberg([]) == []


def test_benjamini_hochberg_is_the_published_example() -> None:
    """Fifteen p-values of Benjamini & Hochberg 1995, section 3.2: four are rejected at 5%."""
    p_values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p_values += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    assert sum(p <= 0.05 for p in stats.benjamini_hochberg(p_values)) == 4


def test_arms_that_no_test_tells_apart_are_tied() -> None:
    means = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}
    assert stats.tied_sets(means, []) == [("a", "b", "c", "d")]
    chain = [("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    assert stats.tied_sets(means, chain) == [("a", "b"), ("b", "c"), ("d",)]
    every = [(x, y) for x in means for y in means if x < y]
    assert stats.tied_sets(means, every) == [("a",), ("b",), ("c",), ("d",)]
    assert stats.tied_sets({}, []) == []


@pytest.mark.parametrize("seed", range(5))
def test_tied_sets_are_the_maximal_cliques(seed: int) -> None:
    """Against all subsets: each set that no pair of `apart` splits and that no arm can join."""
    rng, arms = np.random.default_rng(seed), "abcdef"
    apart = {(x, y) for x in arms for y in arms if x < y and rng.random() < 0.4}
    whole = [{arm for k, arm in enumerate(arms) if bits >> k & 1} for bits in range(1, 2 ** len(arms))]
    fine = [one for one in whole if not any({x, y} <= one for x, y in apart)]
    expected = {tuple(sorted(one)) for one in fine if not any(one < other for other in fine)}
    found = stats.tied_sets(dict.fromkeys(arms, 0.5), apart)
    assert {tuple(sorted(one)) for one in found} == expected
    assert len(found) == len(expected)


def test_cluster_bootstrap_has_the_width_of_cluster_robust_errors() -> None:
    """Half-width over statsmodels' cluster-robust standard error (CR1) is t with K - 1 degrees of freedom."""
    values, clusters = clustered(60, 8, seed=1)
    robust = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": np.array(clusters)})
    found = stats.cluster_bootstrap(values, clusters, lowest=-1.0, seed=2)
    assert (found.high - found.low) / 2 / float(robust.bse[0]) == pytest.approx(2.001, rel=0.05)
    plain = stats.bca_mean(values, lowest=-1.0, seed=2)
    assert found.high - found.low > 1.8 * (plain.high - plain.low)


@pytest.mark.parametrize("clusters", [8, 30])
def test_cluster_bootstrap_covers(clusters: int) -> None:
    """300 comparisons; 0.95 - 3 standard errors, and with 8 clusters 2 points less: few say little about the spread."""
    covered = 0
    for seed in range(300):
        values, names = clustered(clusters, 5, seed, shift=0.1)
        found = stats.cluster_bootstrap(values, names, lowest=-1.0, seed=seed, resamples=1000)
        covered += found.low <= 0.1 <= found.high
    assert covered / 300 >= (0.95 if clusters > 8 else 0.93) - 3 * math.sqrt(0.05 * 0.95 / 300)


def test_clusters_of_one_are_the_plain_tests() -> None:
    values, _ = clustered(200, 1, seed=3)
    alone = list(range(200))
    plain, found = (
        stats.bca_mean(values, lowest=-1.0, seed=1),
        stats.cluster_bootstrap(values, alone, lowest=-1.0, seed=1),
    )
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.004)
    p_value = stats.cluster_sign_flip(values, alone, seed=1)
    assert p_value == pytest.approx(stats.sign_flip(values, seed=1), abs=0.015)


def test_flipping_clusters_together_does_not_believe_copies() -> None:
    """Ten answers, each told 20 times: the plain test is sure, the clustered one has ten differences."""
    values = np.repeat([0.4, 0.3, 0.5, -0.1, 0.2, 0.4, -0.2, 0.3, 0.1, 0.2], 20)
    names = [k // 20 for k in range(200)]
    assert stats.sign_flip(values, seed=1) < 0.001
    expected = stats.sign_flip(values[::20], seed=5)
    assert stats.cluster_sign_flip(values, names, seed=1) == pytest.approx(expected, abs=0.01)
    assert expected > 0.01


def test_clusters_that_agree_are_no_certainty() -> None:
    for values, names in ((np.zeros(40), list(range(40))), (np.full(10, 0.2), ["one document"] * 10)):
        found = stats.cluster_bootstrap(values, names, lowest=-1.0, seed=0)
        assert found.low < values[0] < found.high


def test_cluster_sums_follow_first_appearance() -> None:
    sums, sizes = cluster_sums(np.array([1.0, 0.5, 0.25]), ["b", "a", "b"])
    assert (list(sums), list(sizes)) == ([1.25, 0.5], [2.0, 1.0])


def test_strengths_are_those_of_agrestis_baseball() -> None:
    """American League East 1987; Agresti 2013, Categorical Data Analysis, table 11.10 (Baltimore = 0)."""
    published = (1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0.0)
    found, tie = davidson(np.array([WON], dtype=np.float64), np.zeros((1, 7, 7)))
    assert list(found[0] - found[0, 6]) == pytest.approx(published, abs=6e-4)
    assert tie[0] == 0


def test_strengths_with_ties_have_the_highest_likelihood() -> None:
    rng = np.random.default_rng(4)
    wins = rng.integers(1, 9, (4, 4)) * (1 - np.eye(4))
    ties = np.triu(rng.integers(0, 6, (4, 4)), 1).astype(np.float64)

    def loss(theta: Floats) -> float:
        s, t = np.exp(np.append(theta[:3], -np.sum(theta[:3]))), np.exp(theta[3])
        middle = t * np.sqrt(np.outer(s, s))
        total = s[:, None] + s[None, :] + middle
        return -float(np.sum(wins * np.log(s[:, None] / total)) + np.sum(ties * np.log(middle / total)))

    best = scipy.optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    found, tie = davidson(wins[None], ties[None])
    assert list(found[0, :3]) == pytest.approx(list(best[:3]), abs=1e-5)
    assert tie[0] == pytest.approx(np.exp(best[3]), abs=1e-4)


def judged(questions: int, seed: int) -> list[Preference]:
    """Arms a 1.0 above b, b 0.5 above c; one judgement in five is a tie."""
    rng, value = np.random.default_rng(seed), {"a": 0.8333, "b": -0.1667, "c": -0.6667}
    found = []
    for question in range(questions):
        for x, y in (("a", "b"), ("b", "c"), ("a", "c")):
            share = 1 / (1 + np.exp(value[y] - value[x]))
            outcome: Outcome = "tie" if rng.random() < 0.2 else "a" if rng.random() < share else "b"
            found.append(Preference(question, x, y, outcome))
    return found


def test_preferences_give_strengths_with_intervals_that_cover() -> None:
    covered, runs = 0, 60
    for seed in range(runs):
        found = stats.bradley_terry(judged(120, seed), seed=seed, resamples=200)
        covered += found["a"].interval.low <= 0.8333 <= found["a"].interval.high
    assert covered / runs >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs)
    assert found["a"].value > found["b"].value > found["c"].value


def test_an_arm_that_never_loses_has_a_finite_strength_and_doubled_judgements_add_nothing() -> None:
    once = [Preference(q, "a", "b", "a") for q in range(10)]
    found = stats.bradley_terry(once, seed=1)
    assert 0 < found["a"].value < 3
    twice = [*judged(30, 1), *judged(30, 1)]
    single, double = (
        stats.bradley_terry(judged(30, 1), seed=1, prior=0.01),
        stats.bradley_terry(twice, seed=1, prior=0.02),
    )
    assert double["a"].interval.low == pytest.approx(single["a"].interval.low, abs=1e-6)
    assert double["a"].value == pytest.approx(single["a"].value, abs=1e-6)
