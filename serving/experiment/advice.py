"""Prompt, retrieval, finetuning or both: said in one sentence, from the tests, and only where they decide.

For each metric the best arm is tested against every other. Because the best is picked by the same answers, the tests
are adjusted over all pairs of arms. What all arms not shown to be worse have in common is what wins.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

from graftwork import stats
from graftwork.report.records import Advice, ArmKind, Difference, MetricAdvice
from graftwork.serving.experiment.verdict import Rules, ScoredArms, family

Winner = Literal["prompting", "retrieval", "finetuning", "finetuning with retrieval"]

Found = tuple[MetricAdvice, Difference | None]
"""The advice on one metric, and the difference that it turns on."""

METRICS = ("facts", "form", "both")
_COST: tuple[ArmKind, ...] = ("prompt", "rag", "finetune", "both")
_WINNER: dict[ArmKind, Winner] = {
    "prompt": "prompting",
    "rag": "retrieval",
    "finetune": "finetuning",
    "both": "finetuning with retrieval",
}
_INGREDIENTS = {"prompt": frozenset[str](), "rag": {"retrieval"}, "finetune": {"finetuning"},
                "both": {"retrieval", "finetuning"}}  # fmt: skip
_ON = {"both": "on both together"}


def advise(scored: ScoredArms, kinds: Mapping[str, ArmKind], rules: Rules, metrics: Sequence[str] = METRICS) -> Advice:
    """The advice on each metric (facts, form and both together); the last of them is the primary one."""
    found = tuple(_advise_metric(scored, kinds, metric, rules) for metric in metrics)
    won, caveats = _won(found, scored, rules), _open(found, scored)
    sentence, caveats = (won, caveats) if won else (caveats[0], caveats[1:])
    return Advice(sentence=sentence, caveats=caveats, metrics=tuple(one for one, _ in found))


def _advise_metric(scored: ScoredArms, kinds: Mapping[str, ArmKind], metric: str, rules: Rules) -> Found:
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
    winner = _winner([kinds[arm] for arm in tied], open_rivals)
    beaten = [rival for rival in rivals if rival not in open_rivals]
    blocking = [
        rival for rival in open_rivals if not _INGREDIENTS[kinds[best]] <= _INGREDIENTS[kinds[_other(rival, best)]]
    ]
    turning = _closest((blocking or open_rivals) if winner is None else beaten, best, scored, metric)
    sentence = _sentence(scored, metric, best, tied, winner, turning)
    return MetricAdvice(metric=metric, best=best, tied=tied, groups=groups, winner=winner, sentence=sentence), turning


def _on(metric: str) -> str:
    return _ON.get(metric, f"on {metric.replace('_', ' ')}")


def _groups(scored: ScoredArms, metric: str, pairs: Sequence[Difference]) -> tuple[tuple[str, ...], ...]:
    apart = [(pair.a, pair.b) for pair in pairs if pair.verdict in ("better", "worse")]
    return tuple(stats.tied_sets({arm: scored.mean(arm, metric) for arm in scored.names}, apart))


def _against(arm: str, pairs: Sequence[Difference]) -> list[Difference]:
    return [pair for pair in pairs if arm in (pair.a, pair.b)]


def _other(pair: Difference, arm: str) -> str:
    return pair.b if pair.a == arm else pair.a


def _winner(kinds: Sequence[ArmKind], rivals: Sequence[Difference]) -> Winner | None:
    """What all tied arms share; the cheapest of them when they are shown to be equivalent; None when open."""
    if len(set(kinds)) == 1:
        return _WINNER[kinds[0]]
    if rivals and all(rival.verdict == "equivalent" for rival in rivals):
        return _WINNER[min(kinds, key=_COST.index)]
    shared = frozenset.intersection(*(frozenset(_INGREDIENTS[kind]) for kind in kinds))
    return next((_WINNER[kind] for kind in _COST if shared and _INGREDIENTS[kind] == shared), None)


def _closest(pairs: Sequence[Difference], best: str, scored: ScoredArms, metric: str) -> Difference | None:
    return max(pairs, key=lambda pair: scored.mean(_other(pair, best), metric), default=None)


def _sentence(
    scored: ScoredArms, metric: str, best: str, tied: Sequence[str], winner: Winner | None, turning: Difference | None
) -> str:
    score = f"{best} {scored.mean(best, metric):.2f}"
    if winner is None:
        assert turning is not None, "an open question has an open pair"
        rival = _other(turning, best)
        rest = [arm for arm in tied[1:] if arm != rival]
        also = f" (nor are {_join(rest)} told apart)" if rest else ""
        return (f"{_on(metric).capitalize()}: undecided between {score} and {rival} {scored.mean(rival, metric):.2f}"
                f"{also}; {_missing(turning)}.")  # fmt: skip
    also = f", not told apart from {_join(tied[1:])}" if len(tied) > 1 else ""
    ahead = f"; {_lead(turning, best)}" if turning is not None else ""
    return f"{_on(metric).capitalize()}: {winner} wins ({score}{also}{ahead})."


def _lead(pair: Difference, best: str) -> str:
    value, low, high = _seen_from(best, pair)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] over {_other(pair, best)}, n={pair.n}"


def _missing(pair: Difference) -> str:
    needed = f"; {pair.n_needed} questions would decide" if pair.n_needed is not None else ""
    return f"minimum detectable effect {pair.mde:.2f} at n={pair.n}{needed}"


def _won(metrics: Sequence[Found], scored: ScoredArms, rules: Rules) -> str:
    """What wins what, in one sentence; empty when nothing is decided."""
    parts: list[str] = []
    for winner in dict.fromkeys(found.winner for found, _ in metrics if found.winner is not None):
        where = _join([_on(found.metric) for found, _ in metrics if found.winner == winner])
        parts.append(f"{winner} {'' if parts else 'wins '}{where}")
    return _as_sentence(_join(parts) + _usable(*metrics[-1], scored, rules)) if parts else ""


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


def _usable(both: MetricAdvice, turning: Difference | None, scored: ScoredArms, rules: Rules) -> str:
    """How many answers the best arm gets wholly right, and by how much it leads."""
    if both.winner is None or turning is None:
        return ""
    value, low, high = _seen_from(both.best, turning)
    also = f" (not told apart from {_join(both.tied[1:])})" if len(both.tied) > 1 else ""
    if both.metric != "both":
        return f": {both.best}{also} {scored.mean(both.best, both.metric):.2f}, {_lead(turning, both.best)}"
    share = 100 * scored.mean(both.best, "both")
    return (
        f": {both.best}{also} answers {share:.0f}% of {turning.n} questions wholly right, "
        f"{100 * value:.0f} points more than {_other(turning, both.best)} "
        f"({100 * (1 - rules.alpha):g}% interval {100 * low:.0f} to {100 * high:.0f})"
    )


def _seen_from(arm: str, pair: Difference) -> tuple[float, float, float]:
    """Value, low and high of the difference with `arm` first."""
    return (pair.value, pair.low, pair.high) if pair.a == arm else (-pair.value, -pair.high, -pair.low)


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)
