"""Every interval and test against an independent source: statsmodels, scipy.stats, R packages' published values."""

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from graftwork import stats
from graftwork.stats import Floats


def graded(n: int, seed: int) -> Floats:
    """Scores in fifths, as `facts` of five fields."""
    return np.random.default_rng(seed).choice([0, 0.2, 0.4, 0.6, 0.8, 1.0], n, p=[0.4, 0.1, 0.1, 0.1, 0.1, 0.2])


def ends(interval: stats.Interval) -> tuple[float, float]:
    return interval.low, interval.high


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 20), (1, 20), (10, 20), (20, 20), (137, 200), (9, 1000)])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_wilson_is_statsmodels(successes: int, n: int, alpha: float) -> None:
    low, high = proportion_confint(successes, n, alpha, method="wilson")
    found = stats.wilson(successes, n, alpha)
    assert ends(found) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (6, 0), (8, 3), (3, 8), (30, 12), (400, 340)])
def test_mcnemar_is_statsmodels_and_scipy(wins: int, losses: int) -> None:
    found = stats.mcnemar_exact(wins, losses)
    assert found == pytest.approx(mcnemar([[7, wins], [losses, 4]], exact=True).pvalue, rel=1e-9)
    if wins + losses:
        assert found == pytest.approx(scipy.stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_mid_p_is_the_published_example() -> None:
    """Bentur et al. 2009 in Fagerland, Lydersen & Laake 2013, table 1 (1 against 7): exact 0.070, mid-p 0.039."""
    assert stats.mcnemar_exact(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert stats.mcnemar_midp(1, 7) == stats.mcnemar_midp(7, 1) == pytest.approx(0.0391, abs=5e-5)
    assert stats.mcnemar_midp(0, 0) == 1.0
    assert stats.mcnemar_midp(4, 4) == 1.0
    exact, seen = stats.mcnemar_exact(30, 18), scipy.stats.binom.pmf(18, 48, 0.5)
    assert stats.mcnemar_midp(30, 18) == pytest.approx(exact - seen)


def test_newcombe_is_contingencytables() -> None:
    """Cavo et al. 2012 in R's contingencytables (Fagerland, Lydersen, Laake), tests/testthat/test-ch8.R."""
    found = stats.newcombe_paired(59, 6, 16, 80)
    assert ends(found) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


def test_newcombe_turns_with_the_arms() -> None:
    there, back = stats.newcombe_paired(36, 12, 2, 0), stats.newcombe_paired(36, 2, 12, 0)
    assert ends(there) == pytest.approx((-back.high, -back.low))


@pytest.mark.parametrize("cells", [(20, 0, 0, 0), (0, 0, 0, 20), (0, 20, 0, 0), (10, 0, 0, 10), (1, 0, 0, 0)])
def test_newcombe_of_extreme_tables_is_an_interval(cells: tuple[int, int, int, int]) -> None:
    found, n = stats.newcombe_paired(*cells), sum(cells)
    seen = (cells[1] - cells[2]) / n
    assert -1 <= found.low <= seen <= found.high <= 1
    assert found.high > found.low


@pytest.mark.parametrize("shares", [(0.4, 0.2, 0.1, 0.3), (0.9, 0.06, 0.02, 0.02), (0.05, 0.5, 0.05, 0.4)])
def test_newcombe_covers(shares: tuple[float, float, float, float]) -> None:
    """Coverage of the 95% interval over 3,000 simulated comparisons of 100 questions; 0.94 - 3 standard errors."""
    drawn = np.random.default_rng(5).multinomial(100, shares, size=3000)
    truth = shares[1] - shares[2]
    intervals = [stats.newcombe_paired(*map(int, cells)) for cells in drawn]
    assert np.mean([one.low <= truth <= one.high for one in intervals]) > 0.94 - 3 * math.sqrt(0.05 * 0.95 / 3000)


@pytest.mark.parametrize(("n", "seed"), [(40, 1), (200, 2), (200, 3)])
def test_bca_is_scipy(n: int, seed: int) -> None:
    values = graded(n, seed)
    expected = scipy.stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=7, batch=1000)
    found = stats.bca_mean(values, lowest=0.0, seed=seed, resamples=20_000)
    tolerance = 0.01 if n == 40 else 0.004  # both are Monte Carlo
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=tolerance)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=tolerance)


def test_bca_leans_as_scipy_does_on_skewed_scores() -> None:
    values = np.array([0.0] * 190 + [1.0] * 10)
    expected = scipy.stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=7, batch=1000)
    found = stats.bca_mean(values, lowest=0.0, seed=1, resamples=20_000)
    assert ends(found) == pytest.approx(tuple(expected.confidence_interval), abs=0.005)
    assert found.high - 0.05 > 0.05 - found.low


def test_resampling_is_repeatable_by_seed() -> None:
    values = graded(200, 4)
    assert stats.bca_mean(values, lowest=0.0, seed=3) == stats.bca_mean(values, lowest=0.0, seed=3)
    assert stats.sign_flip(values - 0.4, seed=3) == stats.sign_flip(values - 0.4, seed=3)


def test_equal_scores_are_no_certainty() -> None:
    """0 of n right by any scorer leaves as much open as Wilson says; differences may go either way."""
    none_right = stats.bca_mean(np.zeros(200), lowest=0.0, seed=0)
    assert ends(none_right) == pytest.approx((0.0, stats.wilson(0, 200).high))
    same = stats.bca_mean(np.zeros(200), lowest=-1.0, seed=0)
    assert same.low == -same.high < 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sign_flip_is_scipy(seed: int) -> None:
    differences = graded(60, seed) - graded(60, seed + 10) + (0.1 if seed == 2 else 0.0)
    expected = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=5, batch=2000
    )
    assert stats.sign_flip(differences, seed=seed, resamples=20_000) == pytest.approx(expected.pvalue, abs=0.012)


def test_sign_flip_of_few_differences_is_the_exact_one() -> None:
    """Four differences of one sign: 2 of 16 sign patterns are as extreme."""
    assert stats.sign_flip(np.array([0.2, 0.4, 0.2, 1.0, 0.0]), seed=0) == pytest.approx(2 / 16, abs=0.01)
    assert stats.sign_flip(np.zeros(9), seed=0) == 1.0


def test_holm_is_statsmodels() -> None:
    for seed in range(20):
        p_values = list(np.random.default_rng(seed).uniform(0, 0.2, size=1 + seed % 7))
        assert stats.holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))
    assert stats.holm([]) == []


def test_equivalence_agrees_with_statsmodels_tost() -> None:
    """Inclusion of the 90% interval against the paired t version at 5%, wherever that is not on the border."""
    agreed = 0
    for seed in range(60):
        a = graded(150, seed)
        b = np.where(np.random.default_rng(seed).random(150) < 0.9 - 0.01 * (seed % 20), a, graded(150, seed + 500))
        p_value = ttost_paired(a, b, -0.05, 0.05)[0]
        if abs(p_value - 0.05) > 0.02:
            interval = stats.bca_mean(a - b, 0.1, lowest=-1.0, seed=seed)
            assert stats.equivalent(interval, 0.05) == (p_value < 0.05), f"seed {seed}, p={p_value}"
            agreed += 1
    assert agreed > 30


@pytest.mark.parametrize(
    ("smaller", "ratio", "power", "published"), [(0.125, 2, 0.9, 247.9973), (0.1, 2, 0.8, 233.0945)]
)
def test_questions_for_binary_are_those_of_mess(smaller: float, ratio: float, power: float, published: float) -> None:
    """Printed in the manual of R's MESS::power_mcnemar_test (Duffy 1984; the same formula as Connor 1987)."""
    found = stats.n_for_binary(smaller * (ratio - 1), smaller * (ratio + 1), power=power)
    assert found == math.ceil(published)


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("discordant", [0.05, 0.2, 0.5])
def test_detectable_binary_inverts_the_questions_needed(n: int, discordant: float) -> None:
    mde = stats.mde_binary(n, discordant)
    assert stats.n_for_binary(mde * 1.001, discordant) <= n <= stats.n_for_binary(mde * 0.999, discordant)


def test_detectable_binary_is_found_by_mcnemar_about_as_often_as_said() -> None:
    """2,000 comparisons of 200 questions at the MDE: the exact test is a little conservative against the formula."""
    n, discordant = 200, 0.2
    mde = stats.mde_binary(n, discordant)
    cells = [(discordant + mde) / 2, (discordant - mde) / 2, 1 - discordant]
    drawn = np.random.default_rng(1).multinomial(n, cells, size=2000)
    power = np.mean([stats.mcnemar_exact(int(wins), int(losses)) < 0.05 for wins, losses, _ in drawn])
    assert 0.72 < power < 0.84


@pytest.mark.parametrize("sd", [0.1, 0.45])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_detectable_graded_is_statsmodels(sd: float, alpha: float) -> None:
    expected = NormalIndPower().solve_power(nobs1=200, ratio=0, alpha=alpha, power=0.8, alternative="two-sided")
    assert stats.mde_graded(200, sd, alpha) == pytest.approx(expected * sd, rel=1e-3)
    assert stats.n_for_graded(expected * sd, sd, alpha) in (200, 201)


def test_questions_for_equivalence_show_it() -> None:
    """Simulated normal differences with no true effect: TOST passes in at least 80% of comparisons of that size."""
    n = stats.n_for_equivalence(0.0, 0.3, 0.03)
    means = np.random.default_rng(2).normal(0, 0.3 / math.sqrt(n), size=4000)
    half = 1.6448536 * 0.3 / math.sqrt(n)
    shown = [stats.equivalent(stats.Interval(mean - half, mean + half), 0.03) for mean in means]
    assert 0.78 < np.mean(shown) < 0.83


@pytest.mark.parametrize(
    ("difference", "p_value", "within", "higher", "verdict"),
    [
        (0.2, 0.01, False, True, "better"),
        (-0.2, 0.01, False, True, "worse"),
        (-0.2, 0.01, False, False, "better"),
        (0.2, 0.05, False, True, "undecided"),
        (0.01, 0.01, True, True, "equivalent"),
        (0.0, 1.0, True, True, "equivalent"),
    ],
)
def test_verdict(difference: float, p_value: float, within: bool, higher: bool, verdict: str) -> None:
    assert stats.decide(difference, p_value, within, 0.05, higher=higher) == verdict


def test_no_and_every_success_have_bounds_of_exactly_0_and_1() -> None:
    """The formula's root leaves 1e-18 at most n; reports printed it."""
    for n in (1, 7, 50, 200, 999):
        assert stats.wilson(0, n).low == 0
        assert stats.wilson(n, n).high == 1
        for k in (0, n):
            low, high = proportion_confint(k, n, method="wilson")
            assert (stats.wilson(k, n).low, stats.wilson(k, n).high) == pytest.approx((low, high), abs=1e-12)
