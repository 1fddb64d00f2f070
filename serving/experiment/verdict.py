"""Two arms on the same questions: the difference, its interval, its test, and a verdict or what is missing for one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from graftwork import stats
from graftwork.metrics import metric as metric_named
from graftwork.metrics import signature
from graftwork.report.records import Difference
from graftwork.stats import Floats, Interval

Pair = tuple[str, str, str]
"""(arm a, arm b, metric)"""


@dataclass(frozen=True)
class ScoredArms:
    """Scores by arm and metric, one value a question, questions in the same order for all."""

    values: Mapping[str, Mapping[str, Floats]]
    recipe: Mapping[str, object] = field(default_factory=dict)
    """What else decides the numbers (base, quantisation, template); goes into every signature."""

    @property
    def names(self) -> tuple[str, ...]:
        """The arms, in the order of the spec."""
        return tuple(self.values)

    @property
    def n(self) -> int:
        """Questions."""
        return len(next(iter(next(iter(self.values.values())).values())))

    def mean(self, arm: str, metric: str) -> float:
        """Mean score of an arm."""
        return float(np.mean(self.values[arm][metric]))


@dataclass(frozen=True)
class Rules:
    """How differences are judged. `seed` is the resampling's."""

    alpha: float = 0.05
    margin: float = 0.03
    seed: int = 0


def contrast(scored: ScoredArms, a: str, b: str, metric: str, rules: Rules | None = None) -> Difference:
    """One declared claim on its own: arm `a` against arm `b` on one metric."""
    return family(scored, [(a, b, metric)], rules)[0]


def family(scored: ScoredArms, pairs: Sequence[Pair], rules: Rules | None = None) -> tuple[Difference, ...]:
    """Differences tested together: p-values adjusted by Holm over the family, equivalence at alpha / family size.

    Intervals are each at 1 - alpha on their own; the verdict is the adjusted test's.
    """
    rules = rules or Rules()
    seen = [_Seen.of(scored, pair, rules) for pair in pairs]
    adjusted = stats.holm([one.p_value for one in seen])
    return tuple(one.judged(p, len(pairs), scored, rules) for one, p in zip(seen, adjusted, strict=True))


@dataclass(frozen=True)
class _Seen:
    """One difference before it is known what it was tested together with."""

    pair: Pair
    scores_a: Floats
    scores_b: Floats
    interval: Interval
    p_value: float

    @classmethod
    def of(cls, scored: ScoredArms, pair: Pair, rules: Rules) -> "_Seen":
        arm_a, arm_b, metric = pair
        a, b = scored.values[arm_a][metric], scored.values[arm_b][metric]
        assert len(a) == len(b), f"{arm_a} has {len(a)} scores, {arm_b} has {len(b)}"
        if _is_binary(metric):
            p_value = stats.mcnemar_exact(int(np.sum(a > b)), int(np.sum(a < b)))
        else:
            p_value = stats.sign_flip(a - b, seed=rules.seed)
        return cls(pair, a, b, _interval(a, b, metric, rules.alpha, rules.seed), p_value)

    def judged(self, p_adjusted: float, size: int, scored: ScoredArms, rules: Rules) -> Difference:
        arm_a, arm_b, metric = self.pair
        differences, n = self.scores_a - self.scores_b, len(self.scores_a)
        value, alpha = float(np.mean(differences)), rules.alpha / size
        inside = _interval(self.scores_a, self.scores_b, metric, 2 * alpha, rules.seed)
        higher = metric_named(metric).better == "higher"
        same = stats.equivalent(inside, rules.margin)
        verdict = stats.decide(value, p_adjusted, same, rules.alpha, higher=higher)
        mde, needed = _detectable(differences, metric, rules.margin, alpha)
        interval, test = ("newcombe-10", "mcnemar-exact") if _is_binary(metric) else ("bca", "sign-flip")
        recipe = {"arm": arm_a, "vs": arm_b, **scored.recipe, "ci": interval, "test": test, "holm": size,
                  "seed": rules.seed}  # fmt: skip
        return Difference(
            a=arm_a, b=arm_b, metric=metric, n=n, value=value, low=self.interval.low, high=self.interval.high,
            level=1 - rules.alpha, interval=interval, test=test, p_value=self.p_value, p_adjusted=p_adjusted,
            family=size, wins=int(np.sum(differences > 0)), losses=int(np.sum(differences < 0)),
            ties=int(np.sum(differences == 0)), verdict=verdict, mde=mde,
            n_needed=needed if verdict == "undecided" else None, signature=signature(metric, n, recipe),
        )  # fmt: skip


def _is_binary(metric: str) -> bool:
    return metric_named(metric).kind == "binary"


def _interval(a: Floats, b: Floats, metric: str, alpha: float, seed: int) -> Interval:
    if not _is_binary(metric):
        return stats.bca_mean(a - b, alpha, lowest=-1.0, seed=seed)
    both, only_a, only_b = (int(np.sum(mask)) for mask in ((a > 0) & (b > 0), a > b, a < b))
    return stats.newcombe_paired(both, only_a, only_b, len(a) - both - only_a - only_b, alpha)


def _detectable(differences: Floats, metric: str, margin: float, alpha: float) -> tuple[float, int]:
    """Smallest difference that these questions find, and the questions that would decide (both with 80% power).

    Decide: find the seen difference or, where it is within the margin, show that. Plans with the upper 80% bound of the
    share of discordant questions, because a few seen ones say little; and never with none: nothing seen is not nothing
    there.
    """
    n, value = len(differences), abs(float(np.mean(differences)))
    sd = max(float(np.std(differences)), n**-0.5)
    if _is_binary(metric):
        seen = int(np.sum(differences != 0))
        discordant = stats.wilson(seen, n, 0.4).high
        sd = discordant**0.5
        mde, find = stats.mde_binary(n, max(seen, 1) / n, alpha), partial(stats.n_for_binary, discordant=discordant)
    else:
        mde, find = min(1.0, stats.mde_graded(n, sd, alpha)), partial(stats.n_for_graded, sd=sd)
    needed = [find(value, alpha=alpha)] if value > 0 else []
    needed += [stats.n_for_equivalence(value, sd, margin, alpha)] if value < margin else []
    return mde, max(n + 1, min(needed))
