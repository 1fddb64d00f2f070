"""`graftwork rag index` and `graftwork rag eval`: builds an index, measures retrievers in pairs, records the choice."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from graftwork import metrics
from graftwork.datasets.keys import KeyCheck
from graftwork.errors import ConfigError, DataError
from graftwork.report.schema import Difference, Record, Score
from graftwork.retrieval import Hit, Retriever, open_retriever
from graftwork.retrieval.bm25 import LexicalIndex
from graftwork.retrieval.corpus import document_of, read_corpus
from graftwork.retrieval.dense import shared_embedder
from graftwork.retrieval.index_store import LEXICAL_FILE, PublishedIndex, RetrieverChoice
from graftwork.serving.evaluation.differences import Rules, ScoredArms, arm_score, family
from graftwork.serving.rag.questions import MRR_DEPTH, Question, question_keys, read_questions, require_gold
from graftwork.serving.rag.rerank import rerank_all
from graftwork.serving.rag.spec import RagSpec
from graftwork.stats import Floats


def make_index(spec: RagSpec, *, on_progress: Callable[[int, int], None] | None = None) -> PublishedIndex:
    """Read the sources and make their index current; only what changed since the last one is worked on.

    on_progress: called with (passages embedded, of how many). Raises DataError, StorageError, BaseModelError.
    """
    ignored: list[str] = []
    passages = read_corpus(spec.sources, spec.chunk, ignored)
    embedder = (spec.embedder.uri, shared_embedder(spec.embedder)) if spec.needs_vectors else None
    done = spec.home.publish(
        spec.name,
        passages,
        made_from=spec.made_from(),
        sources=[source.uri for source in spec.sources],
        embedder=embedder,
        on_progress=on_progress,
    )
    return replace(done, notes=tuple(ignored))


def open_made(spec: RagSpec, kind: str) -> Retriever:
    """A retriever over the current index. Raises DataError where that was made from other sources."""
    manifest = spec.home.current()
    if manifest.made_from != spec.made_from():
        raise DataError(
            f"index {spec.home.store.uri}",
            f"it was made from {', '.join(manifest.sources)}, or cut another way",
            "an index is searched by the spec that made it",
            "run `graftwork rag index FILE` with this spec, or give it another name",
        )
    return open_retriever(spec.retriever(kind))  # type: ignore[arg-type]  # checked by the caller's Literal


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
    """Report of `graftwork rag eval`."""

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
    """Location of the scores of each question (`per_question`)."""
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
    chosen, sentence = _choose([d for d in differences if d.metric == DECIDES.name], k)
    reports = tuple(
        RetrieverReport(
            name=arm,
            scores={m.name: _score(arm, m, scored, rules) for m in measured},
            ms_p50=_quantile(times_ms.get(arm, ()), 0.5),
            ms_p99=_quantile(times_ms.get(arm, ()), 0.99),
        )
        for arm in found
    )
    return RagReport(
        name=name,
        version=version,
        passages=passages,
        n=len(questions),
        k=k,
        retrievers=reports,
        differences=tuple(differences),
        chosen=chosen,
        sentence=sentence,
        notes=notes,
    )


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


def _choose(differences: Sequence[Difference], k: int) -> tuple[str, str]:
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
    return f"{d.value * 100:+.1f} points [{d.low * 100:+.1f}, {d.high * 100:+.1f}], p={d.p_adjusted:.2g}, n={d.n}"


def _quantile(values: Sequence[float], q: float) -> float | None:
    return metrics.quantile(values, q) if values else None


# Run of `rag eval`; retrievers of kind `auto` follow the choice that it records.


Progress = Callable[[int, int, str], None]
RERANKED = "lexical+rerank"
QUESTIONS_FILE = "eval.jsonl"


def run_eval(spec: RagSpec, *, on_progress: Progress | None = None) -> RagReport:
    """Measure the spec's retrievers on its questions and record the choice next to the index.

    Needs an initialised Ray only where the spec asks for a rerank. Raises ConfigError without questions, DataError
    for questions of another corpus.
    """
    keys = question_keys()
    questions = questions_of(spec, keys)
    retrievers = {kind: open_made(spec, kind) for kind in spec.kinds}
    folder = spec.home.folder(spec.home.current())
    documents = frozenset(document_of(p.id) for _, p in LexicalIndex.open(folder / LEXICAL_FILE).numbered())
    require_gold(questions, retrievers["lexical"], documents, f"index {spec.home.store.uri}")
    depth = max(spec.k, MRR_DEPTH, spec.rerank.candidates if spec.rerank else 0)
    hits: dict[str, list[Sequence[Hit]]] = {}
    times_ms: dict[str, list[float]] = {}
    for kind, retriever in retrievers.items():
        hits[kind], times_ms[kind] = _search(kind, retriever, questions, depth, on_progress)
    if spec.rerank is not None:
        hits[RERANKED], times_ms[RERANKED] = rerank_all(spec, hits["lexical"], questions, on_progress)
    manifest = spec.home.current()
    report = judge(
        hits,
        questions,
        name=spec.name,
        version=manifest.version,
        passages=manifest.passages,
        k=spec.k,
        times_ms=times_ms,
        seed=spec.seed,
        notes=keys.note("questions"),
    )
    kind = next((kind for kind in spec.kinds if kind == report.chosen), "lexical")  # an arm asks for a rerank itself
    spec.home.choose(RetrieverChoice(kind=kind, version=manifest.version, sentence=report.sentence))
    spec.home.store.write_bytes(per_question(hits, questions, spec.k), QUESTIONS_FILE)
    return report.model_copy(update={"questions_uri": spec.home.store.path(QUESTIONS_FILE)})


def questions_of(spec: RagSpec, keys: KeyCheck | None = None) -> list[Question]:
    """Read the questions of the spec; keys: as in `read_questions`.

    Raises ConfigError where the spec has none, DataError for a bad row.
    """
    if spec.questions is None:
        raise ConfigError(
            "questions",
            "the key is missing",
            "retrievers are measured on questions whose passage is known",
            "add `questions:`, a JSONL with question, doc_id and answers",
        )
    return read_questions(spec.questions, spec.limit, keys)


def _search(
    kind: str, retriever: Retriever, questions: Sequence[Question], depth: int, on_progress: Progress | None
) -> tuple[list[Sequence[Hit]], list[float]]:
    """Return the hits of each question, and the wall ms of its search."""
    hits: list[Sequence[Hit]] = []
    times: list[float] = []
    retriever.search(questions[0].text, depth)  # loads an embedder, opens a connection: no part of a search
    for number, question in enumerate(questions, start=1):
        began = time.perf_counter()
        hits.append(retriever.search(question.text, depth))
        times.append((time.perf_counter() - began) * 1000)
        if on_progress is not None:
            on_progress(number, len(questions), kind)
    return hits, times
