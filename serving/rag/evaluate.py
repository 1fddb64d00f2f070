"""Retrievers on the same questions: measured, compared in pairs, and one of them chosen."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from graftwork import metrics
from graftwork.report.record import Record
from graftwork.report.records import Difference, Score
from graftwork.retrieval import Hit
from graftwork.serving.experiment.verdict import Rules, ScoredArms, arm_score, family
from graftwork.serving.rag.questions import MRR_DEPTH, Question
from graftwork.stats import Floats

Found = Mapping[str, Sequence[Sequence[Hit]]]
"""By retriever the hits of each question, at least max(k, MRR_DEPTH) deep."""
DECIDES = metrics.HIT
"""The metric that the choice is made by: what is not among the k passages, no model can use."""
_SIMPLEST = "lexical"


class RetrieverReport(Record):
    """One retriever over all questions."""

    name: str
    scores: dict[str, Score]
    ms_p50: float | None
    """Wall time of a search, alone on the machine or not; null: not measured."""
    ms_p99: float | None


class RagReport(Record):
    """What `graftwork rag eval` found."""

    name: str
    version: str
    """Of the index."""
    passages: int
    n: int
    k: int
    retrievers: tuple[RetrieverReport, ...]
    differences: tuple[Difference, ...]
    """Against lexical, paired by question, Holm within a metric."""
    chosen: str
    sentence: str
    questions_uri: str = ""
    """Where the scores of each question are (`per_question`)."""
    notes: tuple[str, ...] = ()
    """Keys of the questions that are ignored."""


def judge(
    found: Found,
    questions: Sequence[Question],
    *,
    name: str,
    version: str,
    passages: int,
    k: int,
    times_ms: Mapping[str, Sequence[float]],
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> RagReport:
    """Scores, differences against lexical, and the choice: lexical, unless another is shown to be better."""
    values = {arm: _values(hits, questions, k) for arm, hits in found.items()}
    scored = ScoredArms(values, {"index": version, "k": k}, metrics.RETRIEVAL, _clusters(questions))
    rules = Rules(seed=seed)
    measured = [metric for metric in metrics.RETRIEVAL if metric.name in next(iter(values.values()))]
    others = [arm for arm in found if arm != _SIMPLEST]
    differences = [d for m in measured for d in family(scored, [(a, _SIMPLEST, m.name) for a in others], rules)]
    chosen, sentence = _choose(scored, [d for d in differences if d.metric == DECIDES.name], k)
    reports = tuple(
        RetrieverReport(
            name=arm, scores={m.name: _score(arm, m, scored, rules) for m in measured},
            ms_p50=_quantile(times_ms.get(arm, ()), 0.5), ms_p99=_quantile(times_ms.get(arm, ()), 0.99),
        )
        for arm in found
    )  # fmt: skip
    return RagReport(
        name=name, version=version, passages=passages, n=len(questions), k=k, retrievers=reports,
        differences=tuple(differences), chosen=chosen, sentence=sentence, notes=notes,
    )  # fmt: skip


def per_question(found: Found, questions: Sequence[Question], k: int) -> bytes:
    """A JSON line a question: its gold passages, and of each retriever the k passages, the gold rank and the scores."""
    values = {name: _values(hits, questions, k) for name, hits in found.items()}
    lines = []
    for place, question in enumerate(questions):
        retrievers = {
            name: {
                "passages": [hit.passage.id for hit in hits[place][:k]],
                "rank": question.rank(hits[place][:MRR_DEPTH]),
                "scores": {metric: float(column[place]) for metric, column in values[name].items()},
            }
            for name, hits in found.items()
        }
        line = {
            "id": question.id,
            "question": question.text,
            "gold": sorted(question.gold_ids),
            "retrievers": retrievers,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _clusters(questions: Sequence[Question]) -> list[str] | None:
    """Questions of one passage are not independent; None where each has its own."""
    documents = [min(question.gold_ids) for question in questions]
    return documents if len(set(documents)) < len(documents) else None


def _score(arm: str, metric: metrics.Metric, scored: ScoredArms, rules: Rules) -> Score:
    score = arm_score(arm, metric, scored, rules)
    assert score is not None, "every retriever answers every question"
    return score


def _values(hits: Sequence[Sequence[Hit]], questions: Sequence[Question], k: int) -> dict[str, Floats]:
    ranks = [question.rank(one[:MRR_DEPTH]) for question, one in zip(questions, hits, strict=True)]
    within = [question.rank(one[:k]) for question, one in zip(questions, hits, strict=True)]
    columns: dict[str, list[float]] = {
        metrics.HIT.name: [float(rank is not None) for rank in within],
        metrics.HIT_1.name: [float(rank == 1) for rank in ranks],
        metrics.MRR.name: [1 / rank if rank else 0.0 for rank in ranks],
    }
    if k == 1:
        del columns[metrics.HIT_1.name]  # the same
    if all(question.answers or question.facts for question in questions):
        answered = [float(q.answered_by(one[:k])) for q, one in zip(questions, hits, strict=True)]
        columns[metrics.IN_CONTEXT.name] = answered
    return {metric: np.array(column, dtype=np.float64) for metric, column in columns.items()}


def _choose(scored: ScoredArms, differences: Sequence[Difference], k: int) -> tuple[str, str]:
    better = [d for d in differences if d.verdict == "better"]
    if better:
        best = max(better, key=lambda d: d.value)
        return best.a, f"Use {best.a}: {_format_difference(best)} over {_SIMPLEST} in hit@{k}."
    if not differences:
        return _SIMPLEST, f"{_SIMPLEST} alone was measured: add dense and hybrid to `retrievers:` to compare."
    said = "; ".join(f"{d.a} is {_verdict(d)}: {_format_difference(d)}" for d in differences)
    return _SIMPLEST, f"Use {_SIMPLEST}: no other is shown to be better in hit@{k}. {said[:1].upper()}{said[1:]}."


def _verdict(difference: Difference) -> str:
    if difference.verdict != "undecided" or difference.n_needed is None:
        return difference.verdict
    return f"undecided (about {difference.n_needed:,} questions would decide)"


def _format_difference(d: Difference) -> str:
    return (f"{d.value * 100:+.1f} points [{d.low * 100:+.1f}, {d.high * 100:+.1f}], p={d.p_adjusted:.2g}, "
            f"n={d.n}")  # fmt: skip


def _quantile(values: Sequence[float], q: float) -> float | None:
    return metrics.quantile(values, q) if values else None
