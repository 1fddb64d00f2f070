"""Strengths of arms from pairwise preferences (a judge's, people's), with ties: Davidson's Bradley-Terry model.

P(a beats b) = s_a / D, P(tie) = t sqrt(s_a s_b) / D with D = s_a + s_b + t sqrt(s_a s_b) (Davidson 1970, JASA
65:317-328). Fitted by minorize-maximize as in Hunter 2004 (Ann Stat 32:384-406), whose bound of -log D is made
separable by sqrt(s_a s_b) <= (s_a r + s_b / r) / 2 with r = sqrt(s_b / s_a) at the current strengths.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graftwork.stats.paired import Floats, Interval

Outcome = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Preference:
    """One judgement: arm `a` against arm `b` on one question."""

    question: Hashable
    a: str
    b: str
    outcome: Outcome


@dataclass(frozen=True)
class Strength:
    """Log strength of an arm, all summing to 0: the chance to beat an arm d lower, ties aside, is 1 / (1 + exp(-d))."""

    value: float
    interval: Interval


def bradley_terry(
    preferences: Sequence[Preference],
    alpha: float = 0.05,
    *,
    seed: int,
    resamples: int = 1000,
    prior: float = 0.5,
) -> dict[str, Strength]:
    """Strength of each arm with a percentile bootstrap interval that draws whole questions.

    `prior` wins each way are added to each pair that met: without any, an arm that never loses is infinitely strong
    (Ford 1957). Judgements of one question (two orders, several judges) stay together.
    """
    arms = sorted({arm for one in preferences for arm in (one.a, one.b)})
    counts = _by_question(preferences, arms)
    draws = np.random.default_rng(seed).multinomial(len(counts), [1 / len(counts)] * len(counts), size=resamples)
    weights = np.vstack([np.ones((1, len(counts))), draws])
    tables = np.tensordot(weights, counts, axes=1)
    met = np.sum(counts, axis=(0, 1)) > 0
    tables[:, 0] += prior * (met | met.T)
    found, _ = davidson(tables[:, 0], tables[:, 1])
    low, high = np.quantile(found[1:], [alpha / 2, 1 - alpha / 2], axis=0)
    return {arm: Strength(float(found[0, k]), Interval(float(low[k]), float(high[k]))) for k, arm in enumerate(arms)}


def davidson(wins: Floats, ties: Floats, *, tolerance: float = 1e-10, rounds: int = 20_000) -> tuple[Floats, Floats]:
    """(log strengths [R, K], tie parameters [R]) of R tables: wins[r, i, j] of i over j, ties[r, i, j] counted once."""
    ties = (ties + np.swapaxes(ties, 1, 2)) / 2
    met = wins + np.swapaxes(wins, 1, 2) + 2 * ties
    scored, tied = np.sum(wins + ties, axis=2), np.sum(ties, axis=(1, 2))
    strength, tie = np.ones(scored.shape), np.where(tied > 0, 1.0, 0.0)
    for _ in range(rounds):
        middle = np.sqrt(strength[:, :, None] * strength[:, None, :])
        share = met / (strength[:, :, None] + strength[:, None, :] + tie[:, None, None] * middle)
        pull = np.sum(share * (1 + tie[:, None, None] / 2 * middle / strength[:, :, None]), axis=2)
        fresh = scored / pull
        fresh /= np.exp(np.mean(np.log(fresh), axis=1, keepdims=True))
        tie = 2 * tied / np.sum(share * middle, axis=(1, 2))
        moved = float(np.max(np.abs(np.log(fresh / strength))))
        strength = fresh
        if moved < tolerance:
            break
    return np.log(strength), tie


def _by_question(preferences: Sequence[Preference], arms: Sequence[str]) -> Floats:
    """counts[question, wins or ties, i, j]."""
    place = {arm: k for k, arm in enumerate(arms)}
    questions = {name: q for q, name in enumerate(dict.fromkeys(one.question for one in preferences))}
    counts = np.zeros((len(questions), 2, len(arms), len(arms)))
    for one in preferences:
        winner, loser = (one.b, one.a) if one.outcome == "b" else (one.a, one.b)
        counts[questions[one.question], int(one.outcome == "tie"), place[winner], place[loser]] += 1
    return counts
