"""`rag eval`: search for every question, judge, and let `auto` retrievers do what was found to be best."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graftwork.errors import ConfigError
from graftwork.retrieval import Hit, Retriever
from graftwork.retrieval.chunks import document_of
from graftwork.retrieval.lexical import LexicalIndex
from graftwork.retrieval.versions import LEXICAL_FILE, RetrieverChoice
from graftwork.row_keys import KeyCheck
from graftwork.serving.rag.evaluate import RagReport, judge, per_question
from graftwork.serving.rag.index import open_made
from graftwork.serving.rag.questions import MRR_DEPTH, Question, question_keys, read_questions, require_gold
from graftwork.serving.rag.spec import RagSpec

Progress = Callable[[int, int, str], None]
RERANKED = "lexical+rerank"
QUESTIONS_FILE = "eval.jsonl"


@dataclass
class _Measured:
    hits: dict[str, list[Sequence[Hit]]] = field(default_factory=dict)
    times_ms: dict[str, list[float]] = field(default_factory=dict)


def run_eval(spec: RagSpec, *, on_progress: Progress | None = None) -> RagReport:
    """Measure the spec's retrievers on its questions and record the choice beside the index.

    Needs an initialised Ray only where the spec asks for a rerank. Raises ConfigError without questions, DataError
    for questions of another corpus.
    """
    keys = question_keys()
    questions = questions_of(spec, keys)
    retrievers = {kind: open_made(spec, kind) for kind in spec.kinds}
    _require_corpus(spec, questions, retrievers["lexical"])
    depth = max(spec.k, MRR_DEPTH, spec.rerank.candidates if spec.rerank else 0)
    measured = _Measured()
    for kind, retriever in retrievers.items():
        _search(measured, kind, retriever, questions, depth, on_progress)
    if spec.rerank is not None:
        from graftwork.serving.rag.reranked import rerank_all  # Ray and torch, which the others do without

        ranked, times = rerank_all(spec, measured.hits["lexical"], questions, on_progress)
        measured.hits[RERANKED], measured.times_ms[RERANKED] = ranked, times
    manifest = spec.home.current()
    report = judge(
        measured.hits, questions, name=spec.name, version=manifest.version, passages=manifest.passages, k=spec.k,
        times_ms=measured.times_ms, seed=spec.seed, notes=keys.note("questions"),
    )  # fmt: skip
    kind = next((kind for kind in spec.kinds if kind == report.chosen), "lexical")  # an arm asks for a rerank itself
    spec.home.choose(RetrieverChoice(kind=kind, version=manifest.version, sentence=report.sentence))
    spec.home.store.write_bytes(per_question(measured.hits, questions, spec.k), QUESTIONS_FILE)
    return report.model_copy(update={"questions_uri": spec.home.store.path(QUESTIONS_FILE)})


def questions_of(spec: RagSpec, keys: KeyCheck | None = None) -> list[Question]:
    """Read the questions of the spec; keys: as in `read_questions`.

    Raises ConfigError where the spec has none, DataError for a bad row.
    """
    if spec.questions is None:
        raise ConfigError("questions", "the key is missing", "retrievers are measured on questions whose passage is "
                          "known", "add `questions:`, a JSONL with question, doc_id and answers")  # fmt: skip
    return read_questions(spec.questions, spec.limit, keys)


def _require_corpus(spec: RagSpec, questions: Sequence[Question], lexical: Retriever) -> None:
    folder = spec.home.folder(spec.home.current())
    ids = (passage.id for _, passage in LexicalIndex.open(folder / LEXICAL_FILE).numbered())
    require_gold(questions, lexical, frozenset(map(document_of, ids)), f"index {spec.home.store.uri}")


def _search(
    measured: _Measured, kind: str, retriever: Retriever, questions: Sequence[Question], depth: int,
    on_progress: Progress | None,
) -> None:  # fmt: skip
    hits, times = measured.hits.setdefault(kind, []), measured.times_ms.setdefault(kind, [])
    retriever.search(questions[0].text, depth)  # loads an embedder, opens a connection: no part of a search
    for number, question in enumerate(questions, start=1):
        began = time.perf_counter()
        hits.append(retriever.search(question.text, depth))
        times.append((time.perf_counter() - began) * 1000)
        if on_progress is not None:
            on_progress(number, len(questions), kind)
