"""Test of each claim: the paired difference, its interval, its p, and the outcome for the published pattern.

The pattern is reproduced where the test, after Holm over all claims, finds a difference in the direction that was
published; not reproduced where it finds the other direction, or shows the difference to be within the margin; else
undecided.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from examples.studies.schema import StudyClaim
from examples.studies.scores import Scores, mean_interval
from examples.studies.spec import ClaimSpec, StudySpec
from graftwork import stats
from graftwork.stats import Floats, Interval

Outcome = Literal["reproduced", "not reproduced", "undecided"]


def judge(spec: StudySpec, found: Mapping[str, Scores]) -> tuple[StudyClaim, ...]:
    """Every claim of the study, tested together. `found` by measure name; the same scores give the same numbers."""
    tests = [_test(claim, found[spec.measure_of(claim).name], spec.seed) for claim in spec.claims]
    adjusted = stats.holm([test.p_value for test in tests])
    return tuple(_judged(claim, test, p, spec) for claim, test, p in zip(spec.claims, tests, adjusted, strict=True))


@dataclass(frozen=True)
class _Test:
    """A difference and how it is tested; `interval` for any level."""

    name: str
    a: Floats
    b: Floats
    seed: int
    several: bool = False
    """A unit has several questions, and scores within -1 to 1."""

    @property
    def value(self) -> float:
        return float(np.mean(self.a) - np.mean(self.b))

    @property
    def p_value(self) -> float:
        if self.name == "welch":
            return welch(self.a, self.b, 0.05)[1]
        if self.name == "mcnemar-exact":
            return stats.mcnemar_exact(int(np.sum(self.a > self.b)), int(np.sum(self.a < self.b)))
        return stats.sign_flip(self.a - self.b, seed=self.seed)

    def interval(self, alpha: float) -> Interval:
        if self.name == "welch":
            return welch(self.a, self.b, alpha)[0]
        if self.name == "mcnemar-exact":
            return stats.newcombe_scores(self.a, self.b, alpha)
        return mean_interval(self.a - self.b, alpha, lowest=-1.0, several=self.several, seed=self.seed)

    def detects(self, alpha: float) -> float:
        """Smallest true difference that is found with 80% power (normal)."""
        if self.name == "welch":
            spread = math.sqrt(np.var(self.a, ddof=1) / len(self.a) + np.var(self.b, ddof=1) / len(self.b))
            return stats.mde_graded(1, spread, alpha)
        sd = max(float(np.std(self.a - self.b)), len(self.a) ** -0.5)
        return stats.mde_graded(len(self.a), sd, alpha)


def _test(claim: ClaimSpec, scores: Scores, seed: int) -> _Test:
    here = scores.of(claim.of)
    a, b = here.per_unit(claim.a, claim.metric), here.per_unit(claim.b, claim.metric)
    if claim.than_of is not None:
        there = scores.of(claim.than_of)
        return _Test(
            "welch", a - b, there.per_unit(claim.a, claim.metric) - there.per_unit(claim.b, claim.metric), seed
        )
    binary = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    return _Test("mcnemar-exact" if binary else "sign-flip", a, b, seed, here.several and claim.metric != "nats")


def _judged(claim: ClaimSpec, test: _Test, p_adjusted: float, spec: StudySpec) -> StudyClaim:
    shown, each = test.interval(spec.alpha), spec.alpha / len(spec.claims)
    outcome = outcome_of(claim, test.value, p_adjusted, test.interval(2 * each), spec.alpha, spec.equivalence_margin)
    return StudyClaim(
        statement=claim.statement,
        a=claim.a,
        b=claim.b,
        metric=claim.metric,
        measure=spec.measure_of(claim).name,
        of=None if claim.of is None else str(claim.of),
        than_of=None if claim.than_of is None else str(claim.than_of),
        expect=claim.expect,
        value=test.value,
        low=shown.low,
        high=shown.high,
        level=1 - spec.alpha,
        n=len(test.a),
        n_than_of=len(test.b) if test.name == "welch" else None,
        test=test.name,
        p_value=test.p_value,
        p_adjusted=p_adjusted,
        family=len(spec.claims),
        detects=test.detects(each),
        outcome=outcome,
    )


def outcome_of(
    claim: ClaimSpec, value: float, p_adjusted: float, inside: Interval, alpha: float, margin: float
) -> Outcome:
    """Whether the published pattern shows. `inside`: the interval at 1 - 2 alpha / claims, for one-sided questions."""
    if claim.expect == "not lower":
        return (
            "reproduced"
            if inside.low > -claim.margin
            else ("not reproduced" if inside.high < -claim.margin else "undecided")
        )
    if stats.equivalent(inside, margin):
        return "not reproduced"
    if p_adjusted >= alpha or value == 0:
        return "undecided"
    return "reproduced" if (value > 0) == (claim.expect == "higher") else "not reproduced"


def welch(a: Floats, b: Floats, alpha: float) -> tuple[Interval, float]:
    """Interval of mean(a) - mean(b) of two independent samples, and its two-sided p (Welch 1947)."""
    part_a, part_b = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    value, error = float(np.mean(a) - np.mean(b)), math.sqrt(part_a + part_b)
    if error == 0:
        return Interval(value, value), 1.0 if value == 0 else 0.0
    freedom = (part_a + part_b) ** 2 / (part_a**2 / (len(a) - 1) + part_b**2 / (len(b) - 1))
    reach = float(stdtrit(freedom, 1 - alpha / 2)) * error
    return Interval(value - reach, value + reach), 2 * float(stdtr(freedom, -abs(value) / error))
