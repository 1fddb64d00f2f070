"""Tests that hold at every look, against enumeration of all outcomes, scipy, and their formulas written out."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from scipy.special import gammaln

from graftwork.stats import Floats
from graftwork.stats.sequential import (
    BLOCK,
    PRIOR_UNITS,
    PRIOR_WEIGHTS,
    AsymptoticSequence,
    BettingSequence,
    LimitTest,
    MeanTest,
    PairScores,
    Products,
    SampleRatio,
    SplitScores,
    UnboundedSplitScores,
    sums,
    units_to_show,
)


def sequences(length: int, choices: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """All of them: [length, choices ** length]."""
    return np.array(list(itertools.product(range(choices), repeat=length))).T


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("chance", [0.5, 0.1])
def test_capital_on_a_split_is_fair_where_arms_are_alike(share: float, chance: float) -> None:
    """The mean over all arms and outcomes of 6 units, weighted by their chances, is 1 after each unit."""
    told = sequences(6, 4)
    treated, outcome = told >= 2, (told % 2).astype(np.float64)
    weight = np.cumprod(np.where(treated, chance, 1 - chance) * np.where(outcome > 0, share, 1 - share), axis=0)
    many = told.shape[1]
    scored = SplitScores((many,)).update(treated, outcome, np.full(told.shape, chance))
    capital = MeanTest(np.zeros(1), (many, 1)).update(
        scored.values[..., None], scored.low[..., None], scored.high[..., None], scored.spread[..., None]
    )
    later = 4.0 ** -np.arange(5, -1, -1)  # each beginning stands in the list once for every end
    for side in capital:
        assert np.all(side >= 0)
        assert np.sum(side[..., 0] * weight, axis=1) * later == pytest.approx(np.ones(6), rel=1e-9)


def test_capital_on_an_effect_is_fair_at_the_effect_alone() -> None:
    """Arms with 0.7 and 0.4, chances that move: the mean is 1 at 0.3, and grows against 0."""
    told, chances = sequences(6, 4), np.array([0.5, 0.2, 0.2, 0.9, 0.5, 0.5])[:, None]
    treated, outcome = told >= 2, (told % 2).astype(np.float64)
    share = np.where(treated, 0.7, 0.4)
    weight = np.prod(np.where(treated, chances, 1 - chances) * np.where(outcome > 0, share, 1 - share), axis=0)
    scored = SplitScores((told.shape[1],)).update(treated, outcome, np.broadcast_to(chances, told.shape))
    parts = (scored.values[..., None], scored.low[..., None], scored.high[..., None], scored.spread[..., None])
    above, below = MeanTest(np.array([0.0, 0.3]), (told.shape[1], 2)).update(*parts)
    assert np.sum(above[-1, :, 1] * weight) == pytest.approx(1, rel=1e-9)
    assert np.sum(below[-1, :, 1] * weight) == pytest.approx(1, rel=1e-9)
    assert np.sum(above[-1, :, 0] * weight) > 1.05


def test_capital_on_pairs_is_fair() -> None:
    told = sequences(8, 3)
    weight = np.prod(np.array([0.1, 0.8, 0.1])[told], axis=0)
    scored = PairScores((told.shape[1],)).update((told - 1).astype(np.float64))
    parts = (scored.values[..., None], scored.low[..., None], scored.high[..., None], scored.spread[..., None])
    above, below = MeanTest(np.zeros(1), (told.shape[1], 1)).update(*parts)
    assert np.sum(above[-1, :, 0] * weight) == pytest.approx(1, rel=1e-9)
    assert np.sum(below[-1, :, 0] * weight) == pytest.approx(1, rel=1e-9)


def test_a_limits_capital_is_the_mixture_of_likelihood_ratios() -> None:
    failed = (np.random.default_rng(1).random(40) < 0.3).astype(np.float64)
    found = LimitTest(0.1).update(failed)[-1]
    count, expected = int(np.sum(failed)), 0.0
    for odds in LimitTest.ODDS:
        share = odds * 0.1 / (0.9 + odds * 0.1)
        expected += (
            scipy.stats.binom.pmf(count, 40, share) / scipy.stats.binom.pmf(count, 40, 0.1) / len(LimitTest.ODDS)
        )
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_sample_ratios_capital_is_the_dirichlet_multinomials() -> None:
    """Lindon & Malek's closed form by gamma functions, mixed over two concentrations."""
    planned = np.array([0.5, 0.3, 0.2])
    arms = np.random.default_rng(2).choice(3, 900, p=[0.4, 0.4, 0.2])
    found = SampleRatio(planned).update(arms, np.broadcast_to(planned, (900, 3)))[-1]
    counts, expected = np.bincount(arms, minlength=3), 0.0
    for units, weight in zip(PRIOR_UNITS, PRIOR_WEIGHTS, strict=True):
        prior = units * planned
        log = gammaln(units) - gammaln(units + 900) + np.sum(gammaln(prior + counts) - gammaln(prior))
        expected += weight * math.exp(log - np.sum(counts * np.log(planned)))
    assert found == pytest.approx(expected, rel=1e-8)


def test_the_sample_ratio_is_fair_while_the_plan_moves() -> None:
    told, plan = sequences(10, 2), np.where(np.arange(10) < 5, 0.1, 0.6)
    chances = np.where(told == 0, plan[:, None], 1 - plan[:, None])
    planned = np.broadcast_to(np.stack([plan, 1 - plan], axis=1)[:, None], (*told.shape, 2))
    capital = SampleRatio(np.array([0.1, 0.9]), (told.shape[1],)).update(told, planned)[-1]
    assert np.sum(capital * np.prod(chances, axis=0)) == pytest.approx(1, rel=1e-9)


def test_scores_average_to_the_effect_whatever_the_chances() -> None:
    rng, chance = np.random.default_rng(3), np.tile([0.1, 0.5, 0.9], 20_000)
    treated = rng.random(60_000) < chance
    outcome = (rng.random(60_000) < np.where(treated, 0.7, 0.4)).astype(np.float64)
    scores = SplitScores()
    values = np.concatenate(
        [
            scores.update(treated[k : k + 500], outcome[k : k + 500], chance[k : k + 500]).values
            for k in range(0, 60_000, 500)
        ]
    )
    assert np.mean(values) == pytest.approx(0.3, abs=4 * np.std(values) / math.sqrt(60_000))
    raw = treated * outcome / chance - ~treated * outcome / (1 - chance)
    assert np.std(values) < 0.8 * np.std(raw)


def test_scores_stay_within_their_bounds() -> None:
    rng = np.random.default_rng(4)
    treated, outcome, chance = rng.random(500) < 0.5, rng.random(500), rng.uniform(0.05, 0.95, 500)
    scored = SplitScores().update(treated, outcome, chance)
    assert np.all(scored.low <= scored.values + 1e-12)
    assert np.all(scored.values <= scored.high + 1e-12)
    assert np.all(scored.low <= -1 + 1e-12)
    assert np.all(scored.high >= 1 - 1e-12)


def follow(values: Floats, alpha: float = 0.05) -> BettingSequence:
    found, scores = BettingSequence(alpha, (0.03,)), PairScores()
    for start in range(0, len(values), BLOCK):
        scored = scores.update(values[start : start + BLOCK])
        found.update(scored.values, scored.low, scored.high, scored.spread)
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_the_interval_is_all_means_that_were_never_refuted(seed: int) -> None:
    """Against each mean followed for itself to the end, over a fine grid: refuted are exactly those outside."""
    values = np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], 3000, p=[0.1, 0.7, 0.2])
    seen = follow(values).evidence
    means = np.linspace(-0.5, 0.5, 401)
    test, scores, most = MeanTest(means), PairScores(), np.zeros(401)
    for start in range(0, 3000, BLOCK):
        scored = scores.update(values[start : start + BLOCK])
        parts = (scored.values[:, None], scored.low[:, None], scored.high[:, None], scored.spread[:, None])
        above, below = test.update(*parts)
        most = np.maximum(most, np.max(np.maximum(above, below), axis=0))
    assert not np.any((most < 40) & ((means < seen.low) | (means > seen.high)))
    inside = means[most < 40]
    assert inside[0] - seen.low < 0.01
    assert seen.high - inside[-1] < 0.01
    assert seen.low < 0.1 < seen.high


def test_an_asymptotic_interval_is_the_published_formula_and_shuts_out_0_where_its_e_value_decides() -> None:
    values = np.random.default_rng(5).normal(0.08, 1.0, 3000)
    whole = AsymptoticSequence(0.05)
    ratio = (-2 * math.log(0.05) + math.log(-2 * math.log(0.05) + 1)) / 1000
    low = -math.inf
    for n in range(1, 3001):
        whole.update(values[n - 1 : n])
        seen = whole.evidence
        if n >= 100:
            spread = float(np.var(values[:n]))
            half = math.sqrt(spread * 2 * (n * ratio + 1) / (n * n * ratio) * math.log(math.sqrt(n * ratio + 1) / 0.05))
            low = max(low, float(np.mean(values[:n])) - half)
            assert seen.low == pytest.approx(low, abs=1e-9)
        assert (seen.low > 0) == (seen.e_value >= 20)
    assert whole.evidence.low > 0


def test_asymptotic_sequences_cover() -> None:
    """300 runs of 2,000 skewed values, looked at after every one; 95 % and 3 standard errors."""
    missed = 0
    for seed in range(300):
        found = AsymptoticSequence(0.05)
        found.update(np.random.default_rng(seed).lognormal(0, 0.7, 2000))
        seen = found.evidence
        missed += not seen.low <= math.exp(0.245) <= seen.high
    assert missed / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_unbounded_scores_average_to_the_effect() -> None:
    rng = np.random.default_rng(6)
    treated = rng.random(20_000) < 0.3
    outcome = rng.normal(np.where(treated, 105.0, 100.0), 10.0)
    values = UnboundedSplitScores().update(treated, outcome, np.full(20_000, 0.3))
    assert np.mean(values) == pytest.approx(5, abs=4 * float(np.std(values)) / math.sqrt(20_000))


def test_units_that_are_said_to_decide_do() -> None:
    """At the effect and spread they were planned for, about 80 % of 60 sequences of that length shut out 0."""
    n, decided = units_to_show(0.1, 0.2, 0.05), 0
    for seed in range(60):
        values = np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], n, p=[0.055, 0.79, 0.155])
        decided += follow(values).evidence.low >= 0
    assert 39 <= decided < 60


def test_products_are_exact_however_far_they_go_and_however_they_are_cut() -> None:
    factors = np.random.default_rng(7).choice([0.25, 1.75, 2.0**-40, 2.0**45], 900, p=[0.3, 0.3, 0.2, 0.2])
    single, blocks, exact = Products(()), Products(()), Fraction(1)
    for factor in factors:
        last = single.times(np.array([factor]))[-1]
    found = np.concatenate([blocks.times(factors[:1]), blocks.times(factors[1:700]), blocks.times(factors[700:])])[-1]
    for factor in factors:
        exact *= Fraction(float(factor))
    assert last == found
    assert np.max(np.abs(np.cumsum(np.log2(factors)))) > 400
    assert found == pytest.approx(float(exact), rel=1e-9, abs=0)
    shrunk = Products(())
    for _ in range(4):
        shrunk.times(np.full(900, 0.25))
    for _ in range(4):
        back = shrunk.times(np.full(900, 4.0))
    assert back[-1] == 1.0


def test_sums_are_those_of_single_steps() -> None:
    steps = np.random.default_rng(8).random((1000, 2))
    total = np.zeros(2)
    for step in steps:
        total = total + step
    assert np.array_equal(sums(np.zeros(2), steps)[1][-1], total)
