"""Differences of arms on the same questions: intervals, tests adjusted for their family, verdicts, questions needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftwork import stats
from graftwork.metrics import SCORES, Metric, signature
from graftwork.report.schema import Difference, Score
from graftwork.stats import Floats, Interval

Pair = tuple[str, str, str]
"""(arm a, arm b, metric)"""
Adjust = Literal["holm", "bh"]


@dataclass(frozen=True)
class ScoredArms:
    """Scores by arm and metric, one value a question, questions in the same order for all. NaN: not measured."""

    values: Mapping[str, Mapping[str, Floats]]
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Other inputs of the numbers (base, quantisation, template); part of every signature."""
    metrics: Sequence[Metric] = SCORES
    clusters: Sequence[str] | None = None
    """The document (or the user) of each question, where questions of one are not independent."""

    @property
    def names(self) -> tuple[str, ...]:
        """The arms, in the order of the spec."""
        return tuple(self.values)

    @property
    def n(self) -> int:
        """Questions."""
        return len(next(iter(next(iter(self.values.values())).values())))

    @cached_property
    def by_name(self) -> Mapping[str, Metric]:
        """The metrics by name."""
        return {metric.name: metric for metric in self.metrics}

    def mean(self, arm: str, metric: str) -> float:
        """Mean score of an arm over what was measured."""
        values = self.values[arm][metric]
        return float(np.mean(values[~np.isnan(values)])) if not np.all(np.isnan(values)) else math.nan

    def select_measured(self, arms: Sequence[str], metric: str) -> NDArray[np.bool_]:
        """The questions on which all these arms have a value."""
        missing = [np.isnan(self.values[arm][metric]) for arm in arms]
        found: NDArray[np.bool_] = ~np.any(missing, axis=0)
        return found

    def only(self, mask: Sequence[bool] | NDArray[np.bool_]) -> "ScoredArms":
        """The questions of a slice."""
        kept = np.asarray(mask, dtype=np.bool_)
        values = {arm: {name: scores[kept] for name, scores in by_name.items()} for arm, by_name in self.values.items()}
        clusters = None if self.clusters is None else [c for c, keep in zip(self.clusters, kept, strict=True) if keep]
        return replace(self, values=values, clusters=clusters)


@dataclass(frozen=True)
class Rules:
    """Error rate, equivalence margin and resampling seed of the tests."""

    alpha: float = 0.05
    margin: float = 0.03
    """Of a score; of a measure (time, tokens, cost) this share of arm b's mean."""
    seed: int = 0


def arm_score(arm: str, metric: Metric, scored: ScoredArms, rules: Rules) -> Score | None:
    """Mean of an arm on one metric, with its interval: Wilson for shares of answers, else BCa. None: never measured."""
    kept = scored.select_measured([arm], metric.name)
    values, n = scored.values[arm][metric.name][kept], int(np.sum(kept))
    if n == 0:
        return None
    sample = _Sample(values, _select_clusters(scored.clusters, kept), metric, lowest=0.0)
    method = {"newcombe-10": "wilson"}.get(sample.method, sample.method)
    binary = sample.method == "newcombe-10"
    interval = stats.wilson(int(values.sum()), n, rules.alpha) if binary else sample.interval(rules.alpha, rules.seed)
    recipe = {"arm": arm, **scored.recipe, "ci": method, "seed": rules.seed}
    return Score(
        metric=metric.name,
        value=float(values.mean()),
        low=interval.low,
        high=interval.high,
        level=1 - rules.alpha,
        method=method,
        n=n,
        signature=signature(metric.name, n, recipe),
    )


def family(scored: ScoredArms, pairs: Sequence[Pair], rules: Rules | None = None) -> tuple[Difference, ...]:
    """Differences tested together: p-values adjusted by Holm over the family, equivalence at alpha / family size.

    Intervals are each at 1 - alpha on their own; the verdict is the adjusted test's. A pair of which no question has
    both values is left out.
    """
    rules = rules or Rules()
    return judge(
        [found for pair in pairs if (found := UnadjustedDifference.compute(scored, pair, rules))], rules, "holm"
    )


def judge(seen: Sequence["UnadjustedDifference"], rules: Rules, adjust: Adjust) -> tuple[Difference, ...]:
    """Verdicts on differences that are tested together."""
    correct = stats.holm if adjust == "holm" else stats.benjamini_hochberg
    adjusted = correct([one.p_value for one in seen])
    return tuple(one.adjust(p, len(seen), rules, adjust) for one, p in zip(seen, adjusted, strict=True))


@dataclass(frozen=True)
class _Sample:
    """Values of one metric, a question each, and how their mean is bounded and tested.

    Measures are scaled to within -1..1 for it, so that one resampling serves them and scores alike.
    """

    values: Floats
    clusters: Sequence[str] | None
    metric: Metric
    lowest: float

    @property
    def method(self) -> str:
        """The interval's name."""
        if self.clusters is not None:
            return "cluster-bca"
        return "newcombe-10" if self.metric.kind == "binary" else "bca"

    @cached_property
    def scale(self) -> float:
        return float(np.max(np.abs(self.values), initial=0.0)) or 1.0 if self.metric.kind == "measure" else 1.0

    def interval(self, alpha: float, seed: int) -> Interval:
        """A measure that never varied is what it is; a score that never varied may have an unseen other value."""
        if self.metric.kind == "measure" and not np.ptp(self.values):
            return Interval(float(self.values[0]), float(self.values[0]))
        scaled = self.values / self.scale
        if self.clusters is not None:
            found = stats.cluster_bootstrap(scaled, self.clusters, alpha, lowest=self.lowest, seed=seed)
        else:
            found = stats.bca_mean(scaled, alpha, lowest=self.lowest, seed=seed)
        return Interval(found.low * self.scale, found.high * self.scale)


@dataclass(frozen=True)
class UnadjustedDifference:
    """One difference before it is known what it was tested together with."""

    pair: Pair
    scores_a: Floats
    scores_b: Floats
    sample: _Sample
    recipe: Mapping[str, object]
    interval: Interval
    p_value: float

    @classmethod
    def compute(cls, scored: ScoredArms, pair: Pair, rules: Rules) -> "UnadjustedDifference | None":
        """None where no question has a value of both arms."""
        arm_a, arm_b, name = pair
        kept = scored.select_measured([arm_a, arm_b], name)
        a, b = scored.values[arm_a][name][kept], scored.values[arm_b][name][kept]
        if len(a) == 0:
            return None
        sample = _Sample(a - b, _select_clusters(scored.clusters, kept), scored.by_name[name], lowest=-1.0)
        p_value = _p_value(sample, rules.seed)
        return cls(pair, a, b, sample, scored.recipe, _interval(sample, a, b, rules.alpha, rules.seed), p_value)

    def adjust(self, p_adjusted: float, size: int, rules: Rules, adjust: Adjust) -> Difference:
        """As one of `size` tests."""
        arm_a, arm_b, name = self.pair
        differences, n, metric = self.sample.values, len(self.scores_a), self.sample.metric
        value, alpha = float(np.mean(differences)), rules.alpha / size
        margin = rules.margin * (abs(float(np.mean(self.scores_b))) if metric.kind == "measure" else 1.0)
        inside = _interval(self.sample, self.scores_a, self.scores_b, 2 * alpha, rules.seed)
        same = stats.equivalent(inside, margin)
        verdict = stats.decide(value, p_adjusted, same, rules.alpha, higher=metric.better == "higher")
        mde, needed = _detectable(self.sample, margin, alpha)
        test = _TESTS[self.sample.method]
        recipe = {
            "arm": arm_a,
            "vs": arm_b,
            **self.recipe,
            "ci": self.sample.method,
            "test": test,
            adjust: size,
            "seed": rules.seed,
        }
        return Difference(
            a=arm_a,
            b=arm_b,
            metric=name,
            n=n,
            value=value,
            low=self.interval.low,
            high=self.interval.high,
            level=1 - rules.alpha,
            interval=self.sample.method,
            test=test,
            p_value=self.p_value,
            p_adjusted=p_adjusted,
            family=size,
            adjust=adjust,
            wins=int(np.sum(differences > 0)),
            losses=int(np.sum(differences < 0)),
            ties=int(np.sum(differences == 0)),
            verdict=verdict,
            mde=mde,
            n_needed=needed if verdict == "undecided" else None,
            signature=signature(name, n, recipe),
        )


_TESTS = {"newcombe-10": "mcnemar-exact", "bca": "sign-flip", "cluster-bca": "cluster-sign-flip"}


def _select_clusters(clusters: Sequence[str] | None, kept: NDArray[np.bool_]) -> Sequence[str] | None:
    return None if clusters is None else [name for name, keep in zip(clusters, kept, strict=True) if keep]


def _p_value(sample: _Sample, seed: int) -> float:
    differences = sample.values / sample.scale
    if sample.clusters is not None:
        return stats.cluster_sign_flip(differences, sample.clusters, seed=seed)
    if sample.metric.kind == "binary":
        return stats.mcnemar_exact(int(np.sum(differences > 0)), int(np.sum(differences < 0)))
    return stats.sign_flip(differences, seed=seed)


def _interval(sample: _Sample, a: Floats, b: Floats, alpha: float, seed: int) -> Interval:
    if sample.method != "newcombe-10":
        return sample.interval(alpha, seed)
    return stats.newcombe_scores(a, b, alpha)


def _detectable(sample: _Sample, margin: float, alpha: float) -> tuple[float, int]:
    """Smallest difference that these questions find, and the questions that would decide (both with 80% power).

    Decide: find the seen difference or, where it is within the margin, show that. Plans with the upper 80% bound of the
    share of discordant questions, because a few seen ones say little; and never with none: nothing seen is not nothing
    there. Of clustered questions it counts as if they were independent, times the design effect.
    """
    differences, margin = sample.values / sample.scale, margin / sample.scale
    n, value = len(differences), abs(float(np.mean(differences)))
    design = _design_effect(differences, sample.clusters)
    sd = max(float(np.std(differences)), n**-0.5) * design**0.5
    if sample.metric.kind == "binary":
        seen = int(np.sum(differences != 0))
        discordant = stats.wilson(seen, n, 0.4).high
        sd = (discordant * design) ** 0.5
        mde = stats.mde_binary(max(1, int(n / design)), max(seen, 1) / n, alpha)
        find = partial(stats.n_for_binary, discordant=discordant)
    else:
        mde, find = min(1.0, stats.mde_graded(n, sd, alpha)), partial(stats.n_for_graded, sd=sd)
    needed = [find(value, alpha=alpha)] if value > 0 else []
    if sample.metric.kind == "binary":
        needed = [math.ceil(one * design) for one in needed]
    needed += [stats.n_for_equivalence(value, sd, margin, alpha)] if value < margin else []
    return mde * sample.scale, max(n + 1, min(needed))


def _design_effect(differences: Floats, clusters: Sequence[str] | None) -> float:
    """Variance of the mean by clusters to that of independent questions; at least 1 (Kish 1965)."""
    if clusters is None or len(differences) < 2 or not np.ptp(differences):
        return 1.0
    index = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    sums = np.bincount([index[name] for name in clusters], weights=differences - np.mean(differences))
    return max(1.0, float(np.sum(sums**2) / np.sum((differences - np.mean(differences)) ** 2)))
