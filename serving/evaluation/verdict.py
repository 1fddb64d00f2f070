"""Two arms on the same questions: the difference, its interval, its test, and a verdict or what is missing for one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftwork import stats
from graftwork.metrics import SCORES, TEXT_SCORES, Metric, signature
from graftwork.report import format as words
from graftwork.report.schema import Advice, ArmKind, Difference, MetricAdvice, Score
from graftwork.stats import Floats, Interval

Pair = tuple[str, str, str]
"""(arm a, arm b, metric)"""
Adjust = Literal["holm", "bh"]


@dataclass(frozen=True)
class ScoredArms:
    """Scores by arm and metric, one value a question, questions in the same order for all. NaN: not measured."""

    values: Mapping[str, Mapping[str, Floats]]
    recipe: Mapping[str, object] = field(default_factory=dict)
    """What else decides the numbers (base, quantisation, template); goes into every signature."""
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
    """How differences are judged. `seed` is the resampling's."""

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
    sample = _Sample(values, _of(scored.clusters, kept), metric, lowest=0.0)
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


def contrast(scored: ScoredArms, a: str, b: str, metric: str, rules: Rules | None = None) -> Difference:
    """One declared claim on its own: arm `a` against arm `b` on one metric."""
    return family(scored, [(a, b, metric)], rules)[0]


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
        sample = _Sample(a - b, _of(scored.clusters, kept), scored.by_name[name], lowest=-1.0)
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


def _of(clusters: Sequence[str] | None, kept: NDArray[np.bool_]) -> Sequence[str] | None:
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


# Prompt, retrieval, finetuning or both: said in one sentence, from the tests, and only where they decide.
#
# For each metric the best arm is tested against every other. Because the best is picked by the same answers, the tests
# are adjusted over all pairs of arms. What all arms not shown to be worse have in common is what wins.


Winner = Literal["prompting", "retrieval", "finetuning", "finetuning with retrieval"]

Found = tuple[MetricAdvice, Difference | None]
"""The advice on one metric, and the difference that it turns on."""

TEXT = tuple(metric.name for metric in TEXT_SCORES)
METRICS = ("facts", "form", "both")
_COST: tuple[ArmKind, ...] = ("prompt", "rag", "finetune", "both")
_WINNER: dict[ArmKind, Winner] = {
    "prompt": "prompting",
    "rag": "retrieval",
    "finetune": "finetuning",
    "both": "finetuning with retrieval",
}
_INGREDIENTS = {
    "prompt": frozenset[str](),
    "rag": {"retrieval"},
    "finetune": {"finetuning"},
    "both": {"retrieval", "finetuning"},
}
_ON = {"both": "on both together", "em": "by exact match", "f1": "by F1", "contains": "by containment"}


def advise(
    scored: ScoredArms,
    kinds: Mapping[str, ArmKind],
    rules: Rules,
    metrics: Sequence[str] = METRICS,
    baseline: str | None = None,
) -> Advice:
    """The advice on each metric (facts, form and both together); the last of them is the primary one.

    baseline: the declared one, which the verdict names as such; of arms that score the same it is compared with.
    """
    found = tuple(_advise_metric(scored, kinds, metric, rules, baseline) for metric in metrics)
    won, caveats = _won(found, scored, rules, baseline), _open(found, scored)
    sentence, caveats = (won, caveats) if won else (caveats[0], caveats[1:])
    return Advice(sentence=sentence, caveats=caveats, metrics=tuple(one for one, _ in found))


def _advise_metric(
    scored: ScoredArms, kinds: Mapping[str, ArmKind], metric: str, rules: Rules, baseline: str | None
) -> Found:
    best = max(scored.names, key=lambda arm: (scored.mean(arm, metric), -_COST.index(kinds[arm])))
    pairs = family(scored, [(a, b, metric) for a, b in combinations(scored.names, 2)], rules)
    rivals, groups = _against(best, pairs), _groups(scored, metric, pairs)
    if scored.mean(best, metric) == 0:
        sentence = f"No arm scores above 0 {_on(metric)} (n={rivals[0].n})."
        return MetricAdvice(
            metric=metric, best=best, tied=scored.names, groups=groups, winner=None, sentence=sentence
        ), None
    open_rivals = [rival for rival in rivals if rival.verdict in ("equivalent", "undecided")]
    tied = (best, *(_other(rival, best) for rival in open_rivals))
    beaten = [rival for rival in rivals if rival not in open_rivals]
    winner = _winner([kinds[arm] for arm in tied], open_rivals, beaten)
    blocking = [
        rival for rival in open_rivals if not _INGREDIENTS[kinds[best]] <= _INGREDIENTS[kinds[_other(rival, best)]]
    ]
    pairs_left = (blocking or open_rivals) if winner is None else beaten
    turning = _closest(pairs_left, best, scored, metric, baseline)
    sentence = _sentence(scored, metric, best, tied, winner, turning)
    return MetricAdvice(metric=metric, best=best, tied=tied, groups=groups, winner=winner, sentence=sentence), turning


def _on(metric: str) -> str:
    return _ON.get(metric, f"on {metric.replace('_', ' ')}")


def _sentence_start(text: str) -> str:
    """Return `text` with its first letter upper case; `capitalize` would also turn F1 into f1."""
    return text[:1].upper() + text[1:]


def _groups(scored: ScoredArms, metric: str, pairs: Sequence[Difference]) -> tuple[tuple[str, ...], ...]:
    apart = [(pair.a, pair.b) for pair in pairs if pair.verdict in ("better", "worse")]
    return tuple(stats.tied_sets({arm: scored.mean(arm, metric) for arm in scored.names}, apart))


def _against(arm: str, pairs: Sequence[Difference]) -> list[Difference]:
    return [pair for pair in pairs if arm in (pair.a, pair.b)]


def _other(pair: Difference, arm: str) -> str:
    return pair.b if pair.a == arm else pair.a


def _winner(kinds: Sequence[ArmKind], rivals: Sequence[Difference], beaten: Sequence[Difference]) -> Winner | None:
    """What all tied arms share; the cheapest of them when they are shown to be equivalent; None when open.

    Arms of which none is shown to be worse show nothing of what they share.
    """
    if rivals and all(rival.verdict == "equivalent" for rival in rivals):
        return _WINNER[min(kinds, key=_COST.index)]
    if not beaten:
        return None
    if len(set(kinds)) == 1:
        return _WINNER[kinds[0]]
    shared = frozenset.intersection(*(frozenset(_INGREDIENTS[kind]) for kind in kinds))
    return next((_WINNER[kind] for kind in _COST if shared and _INGREDIENTS[kind] == shared), None)


def _closest(
    pairs: Sequence[Difference], best: str, scored: ScoredArms, metric: str, baseline: str | None
) -> Difference | None:
    """The pair with the best other arm; of those that score the same, with the baseline."""

    def closeness(pair: Difference) -> tuple[float, bool]:
        other = _other(pair, best)
        return scored.mean(other, metric), other == baseline

    return max(pairs, key=closeness, default=None)


def _sentence(
    scored: ScoredArms, metric: str, best: str, tied: Sequence[str], winner: Winner | None, turning: Difference | None
) -> str:
    score = f"{best} {_mean(scored, best, metric)}"
    if winner is None:
        assert turning is not None, "an open question has an open pair"
        rival = _other(turning, best)
        rest = [arm for arm in tied[1:] if arm != rival]
        also = f" (nor are {_join(rest)} told apart)" if rest else ""
        return (
            f"{_sentence_start(_on(metric))}: undecided between {score} and {rival} {_mean(scored, rival, metric)}"
            f"{also}; {_missing(turning)}."
        )
    also = f", not told apart from {_join(tied[1:])}" if len(tied) > 1 else ""
    ahead = f"; {_lead(turning, best)}" if turning is not None else ""
    return f"{_sentence_start(_on(metric))}: {winner} wins ({score}{also}{ahead})."


def _lead(pair: Difference, best: str) -> str:
    value, low, high = _seen_from(best, pair)
    return f"{words.signed(value)} {words.signed_interval(low, high)} over {_other(pair, best)}, n={pair.n}"


def _mean(scored: ScoredArms, arm: str, metric: str) -> str:
    return words.score(scored.mean(arm, metric))


def _missing(pair: Difference) -> str:
    needed = f"; {pair.n_needed} questions would decide" if pair.n_needed is not None else ""
    return f"minimum detectable effect {words.score(pair.mde)} at n={pair.n}{needed}"


def _won(metrics: Sequence[Found], scored: ScoredArms, rules: Rules, baseline: str | None) -> str:
    """What wins what, in one sentence; empty when nothing is decided.

    The three scores of a text belong together: one of them that is undecided is named, for exact match alone rewards
    brevity and containment alone rewards length.
    """
    parts: list[str] = []
    for winner in dict.fromkeys(found.winner for found, _ in metrics if found.winner is not None):
        where = _join([_on(found.metric) for found, _ in metrics if found.winner == winner])
        parts.append(f"{winner} {'' if parts else 'wins '}{where}")
    undecided = [_on(found.metric) for found, _ in metrics if found.winner is None and found.metric in TEXT]
    also = f", undecided {_join(undecided)}" if undecided else ""
    return _as_sentence(_join(parts) + also + _usable(*metrics[-1], scored, rules, baseline)) if parts else ""


def _open(metrics: Sequence[Found], scored: ScoredArms) -> tuple[str, ...]:
    """One sentence for each metric that the tests do not decide."""
    sentences = []
    for found, turning in metrics:
        if found.winner is None and turning is not None:
            pair = f"{found.best} and {_other(turning, found.best)}"
            sentences.append(f"{_on(found.metric)}, undecided between {pair} ({_missing(turning)})")
        elif found.winner is None:
            sentences.append(f"{_on(found.metric)}, no arm scores above 0 (n={scored.n})")
    return tuple(_as_sentence(text) for text in sentences)


def _as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _usable(
    both: MetricAdvice, turning: Difference | None, scored: ScoredArms, rules: Rules, baseline: str | None
) -> str:
    """How many answers the best arm gets wholly right, and by how much it leads which arm."""
    if both.winner is None or turning is None:
        return ""
    value, low, high = _seen_from(both.best, turning)
    also = f" (not told apart from {_join(both.tied[1:])})" if len(both.tied) > 1 else ""
    rival = _rival(both, turning, scored, baseline)
    if both.metric != "both":
        lead = f"{words.signed(value)} {words.signed_interval(low, high)} over {rival}, n={turning.n}"
        texts = _texts((both.best, _other(turning, both.best)), scored)
        return f": {both.best}{also} {_mean(scored, both.best, both.metric)}, {lead}{texts}"
    return (
        f": {both.best}{also} answers {words.percent(scored.mean(both.best, 'both'))} of {turning.n} questions wholly "
        f"right, {words.points(value)} points more than {rival} "
        f"({100 * (1 - rules.alpha):g}% interval {words.points(low)} to {words.points(high)})"
    )


def _rival(both: MetricAdvice, turning: Difference, scored: ScoredArms, baseline: str | None) -> str:
    """The arm that the best is compared with, and why that one."""
    rival = _other(turning, both.best)
    role = "the baseline" if rival == baseline else f"the best {'other arm' if len(both.tied) == 1 else 'arm it beats'}"
    mean = scored.mean(rival, both.metric)
    level = sum(scored.mean(arm, both.metric) == mean for arm in scored.names if arm not in (rival, *both.tied))
    return f"{rival}, {role}" + (f" (level with {level} more arm{'s' * (level > 1)})" if level else "")


def _texts(arms: Sequence[str], scored: ScoredArms) -> str:
    """The three scores of a text side by side, where they are measured."""
    if not set(TEXT) <= set(scored.by_name):
        return ""
    each = [f"{arm} {' / '.join(_mean(scored, arm, name) for name in ('em', 'f1', 'contains'))}" for arm in arms]
    return f" (exact match / F1 / containment: {', '.join(each)})"


def _seen_from(arm: str, pair: Difference) -> tuple[float, float, float]:
    """Value, low and high of the difference with `arm` first."""
    return (pair.value, pair.low, pair.high) if pair.a == arm else (-pair.value, -pair.high, -pair.low)


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)
