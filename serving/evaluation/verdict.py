"""Verdict of a comparison in one sentence: prompting, retrieval, finetuning or both, where the tests decide.

For each metric the best arm is tested against every other. Because the best is picked by the same answers, the tests
are adjusted over all pairs of arms. The ingredients that all arms not shown to be worse have in common win.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

from graftwork import stats
from graftwork.metrics import TEXT_SCORES
from graftwork.report import format as words
from graftwork.report.schema import Advice, ArmKind, Difference, MetricAdvice
from graftwork.serving.evaluation.differences import Rules, ScoredArms, family

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
    won, caveats = _winner_sentence(found, scored, rules, baseline), _open_sentences(found, scored)
    sentence, caveats = (won, caveats) if won else (caveats[0], caveats[1:])
    return Advice(sentence=sentence, caveats=caveats, metrics=tuple(one for one, _ in found))


def _advise_metric(
    scored: ScoredArms, kinds: Mapping[str, ArmKind], metric: str, rules: Rules, baseline: str | None
) -> Found:
    best = max(scored.names, key=lambda arm: (scored.mean(arm, metric), -_COST.index(kinds[arm])))
    pairs = family(scored, [(a, b, metric) for a, b in combinations(scored.names, 2)], rules)
    rivals = [pair for pair in pairs if best in (pair.a, pair.b)]
    apart = [(pair.a, pair.b) for pair in pairs if pair.verdict in ("better", "worse")]
    groups = tuple(stats.tied_sets({arm: scored.mean(arm, metric) for arm in scored.names}, apart))
    if scored.mean(best, metric) == 0:
        sentence = f"No arm scores above 0 {_metric_clause(metric)} (n={rivals[0].n})."
        return MetricAdvice(
            metric=metric, best=best, tied=scored.names, groups=groups, winner=None, sentence=sentence
        ), None
    open_rivals = [rival for rival in rivals if rival.verdict in ("equivalent", "undecided")]
    tied = (best, *(_other_arm(rival, best) for rival in open_rivals))
    beaten = [rival for rival in rivals if rival not in open_rivals]
    winner = _winner([kinds[arm] for arm in tied], open_rivals, beaten)
    blocking = [
        rival for rival in open_rivals if not _INGREDIENTS[kinds[best]] <= _INGREDIENTS[kinds[_other_arm(rival, best)]]
    ]
    pairs_left = (blocking or open_rivals) if winner is None else beaten
    turning = _closest(pairs_left, best, scored, metric, baseline)
    sentence = _sentence(scored, metric, best, tied, winner, turning)
    return MetricAdvice(metric=metric, best=best, tied=tied, groups=groups, winner=winner, sentence=sentence), turning


def _metric_clause(metric: str) -> str:
    return _ON.get(metric, f"on {metric.replace('_', ' ')}")


def _sentence_start(text: str) -> str:
    """Return `text` with its first letter upper case; `capitalize` would also turn F1 into f1."""
    return text[:1].upper() + text[1:]


def _other_arm(pair: Difference, arm: str) -> str:
    return pair.b if pair.a == arm else pair.a


def _winner(kinds: Sequence[ArmKind], rivals: Sequence[Difference], beaten: Sequence[Difference]) -> Winner | None:
    """Return the ingredients that all tied arms share; those of the cheapest when all are equivalent; None when open.

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
        other = _other_arm(pair, best)
        return scored.mean(other, metric), other == baseline

    return max(pairs, key=closeness, default=None)


def _sentence(
    scored: ScoredArms, metric: str, best: str, tied: Sequence[str], winner: Winner | None, turning: Difference | None
) -> str:
    score = f"{best} {_mean(scored, best, metric)}"
    if winner is None:
        assert turning is not None, "an open question has an open pair"
        rival = _other_arm(turning, best)
        rest = [arm for arm in tied[1:] if arm != rival]
        also = f" (nor are {_join(rest)} told apart)" if rest else ""
        return (
            f"{_sentence_start(_metric_clause(metric))}: undecided between {score} and {rival} "
            f"{_mean(scored, rival, metric)}{also}; {_format_mde(turning)}."
        )
    also = f", not told apart from {_join(tied[1:])}" if len(tied) > 1 else ""
    ahead = ""
    if turning is not None:
        value, low, high = _seen_from(best, turning)
        rival = _other_arm(turning, best)
        ahead = f"; {words.signed(value)} {words.signed_interval(low, high)} over {rival}, n={turning.n}"
    return f"{_sentence_start(_metric_clause(metric))}: {winner} wins ({score}{also}{ahead})."


def _mean(scored: ScoredArms, arm: str, metric: str) -> str:
    return words.score(scored.mean(arm, metric))


def _format_mde(pair: Difference) -> str:
    needed = f"; {pair.n_needed} questions would decide" if pair.n_needed is not None else ""
    return f"minimum detectable effect {words.score(pair.mde)} at n={pair.n}{needed}"


def _winner_sentence(metrics: Sequence[Found], scored: ScoredArms, rules: Rules, baseline: str | None) -> str:
    """Return one sentence on what wins by which metric; empty when nothing is decided.

    The three scores of a text belong together: one of them that is undecided is named, for exact match alone rewards
    brevity and containment alone rewards length.
    """
    parts: list[str] = []
    for winner in dict.fromkeys(found.winner for found, _ in metrics if found.winner is not None):
        where = _join([_metric_clause(found.metric) for found, _ in metrics if found.winner == winner])
        parts.append(f"{winner} {'' if parts else 'wins '}{where}")
    undecided = [_metric_clause(found.metric) for found, _ in metrics if found.winner is None and found.metric in TEXT]
    also = f", undecided {_join(undecided)}" if undecided else ""
    return (
        f"{_sentence_start(_join(parts))}{also}{_lead_clause(*metrics[-1], scored, rules, baseline)}." if parts else ""
    )


def _open_sentences(metrics: Sequence[Found], scored: ScoredArms) -> tuple[str, ...]:
    """One sentence for each metric that the tests do not decide."""
    sentences = []
    for found, turning in metrics:
        if found.winner is None and turning is not None:
            pair = f"{found.best} and {_other_arm(turning, found.best)}"
            sentences.append(f"{_metric_clause(found.metric)}, undecided between {pair} ({_format_mde(turning)})")
        elif found.winner is None:
            sentences.append(f"{_metric_clause(found.metric)}, no arm scores above 0 (n={scored.n})")
    return tuple(f"{_sentence_start(text)}." for text in sentences)


def _lead_clause(
    both: MetricAdvice, turning: Difference | None, scored: ScoredArms, rules: Rules, baseline: str | None
) -> str:
    """Return how many answers the best arm gets wholly right, and its lead over the next arm."""
    if both.winner is None or turning is None:
        return ""
    value, low, high = _seen_from(both.best, turning)
    also = f" (not told apart from {_join(both.tied[1:])})" if len(both.tied) > 1 else ""
    rival = _rival(both, turning, scored, baseline)
    if both.metric != "both":
        lead = f"{words.signed(value)} {words.signed_interval(low, high)} over {rival}, n={turning.n}"
        texts = _texts((both.best, _other_arm(turning, both.best)), scored)
        return f": {both.best}{also} {_mean(scored, both.best, both.metric)}, {lead}{texts}"
    return (
        f": {both.best}{also} answers {words.percent(scored.mean(both.best, 'both'))} of {turning.n} questions wholly "
        f"right, {words.points(value)} points more than {rival} "
        f"({100 * (1 - rules.alpha):g}% interval {words.points(low)} to {words.points(high)})"
    )


def _rival(both: MetricAdvice, turning: Difference, scored: ScoredArms, baseline: str | None) -> str:
    """The arm that the best is compared with, and why that one."""
    rival = _other_arm(turning, both.best)
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
