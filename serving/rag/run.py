"""`rag eval`: search for every question, judge, and let `auto` retrievers do what was found to be best."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwork.errors import ConfigError
from graftwork.retrieval import Hit, Retriever
from graftwork.retrieval.chunks import document_of
from graftwork.retrieval.lexical import LexicalIndex
from graftwork.retrieval.versions import LEXICAL_FILE, Choice
from graftwork.serving.app import Endpoint, deploy
from graftwork.serving.rag.evaluate import RagReport, judge
from graftwork.serving.rag.index import open_made
from graftwork.serving.rag.questions import MRR_DEPTH, Question, read_questions, require_gold
from graftwork.serving.rag.rerank import rerank
from graftwork.serving.rag.spec import RagSpec
from graftwork.serving.spec import ArmSpec, EngineSpec, ServeSpec

Progress = Callable[[int, int, str], None]
RERANKED = "lexical+rerank"
_TOGETHER = 4
"""Questions reranked at a time: with 10 candidates each they fill a batch."""


@dataclass
class _Measured:
    hits: dict[str, list[Sequence[Hit]]] = field(default_factory=dict)
    times_ms: dict[str, list[float]] = field(default_factory=dict)


def run_eval(spec: RagSpec, *, on_progress: Progress | None = None) -> RagReport:
    """Measure the spec's retrievers on its questions and record the choice beside the index.

    Needs an initialised Ray only where the spec asks for a rerank. Raises ConfigError without questions, DataError
    for questions of another corpus.
    """
    questions = questions_of(spec)
    retrievers = {kind: open_made(spec, kind) for kind in spec.kinds}
    _require_corpus(spec, questions, retrievers["lexical"])
    depth = max(spec.k, MRR_DEPTH, spec.rerank.candidates if spec.rerank else 0)
    measured = _Measured()
    for kind, retriever in retrievers.items():
        _search(measured, kind, retriever, questions, depth, on_progress)
    if spec.rerank is not None:
        _rerank(spec, measured, questions, on_progress)
    manifest = spec.home.current()
    report = judge(
        measured.hits, questions, name=spec.name, version=manifest.version, passages=manifest.passages, k=spec.k,
        times_ms=measured.times_ms, seed=spec.seed,
    )  # fmt: skip
    if report.chosen in spec.kinds:
        spec.home.choose(Choice(kind=report.chosen, version=manifest.version, sentence=report.sentence))
    return report


def questions_of(spec: RagSpec) -> list[Question]:
    """Raises ConfigError where the spec has none, DataError for a bad row."""
    if spec.questions is None:
        raise ConfigError("questions", "the key is missing", "retrievers are measured on questions whose passage is "
                          "known", "add `questions:`, a JSONL with question, doc_id and answers")  # fmt: skip
    return read_questions(spec.questions, spec.limit)


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


def _rerank(spec: RagSpec, measured: _Measured, questions: Sequence[Question], on_progress: Progress | None) -> None:
    assert spec.rerank is not None
    serve = ServeSpec(
        name=f"rag-{spec.name}"[:63], root=spec.root, base=spec.rerank.base, quant=spec.rerank.quant,
        engine=EngineSpec(max_seq_len=2048),
    )  # fmt: skip
    with deploy(serve, http=False) as endpoint:
        ranked, times = asyncio.run(_reranked(spec, endpoint, measured.hits["lexical"], questions, on_progress))
    measured.hits[RERANKED], measured.times_ms[RERANKED] = ranked, times


async def _reranked(
    spec: RagSpec, endpoint: Endpoint, found: Sequence[Sequence[Hit]], questions: Sequence[Question],
    on_progress: Progress | None,
) -> tuple[list[Sequence[Hit]], list[float]]:  # fmt: skip
    assert spec.rerank is not None
    candidates, gate, done = spec.rerank.candidates, asyncio.Semaphore(_TOGETHER), 0

    async def likelihood(arm: dict[str, Any], messages: Any, texts: Sequence[str], request_id: str) -> Any:
        return await endpoint.likelihood(ArmSpec.model_validate(arm), messages, texts, request_id)

    async def one(question: Question, hits: Sequence[Hit]) -> tuple[list[Hit], float]:
        nonlocal done
        async with gate:
            began = time.perf_counter()
            passages = [hit.passage for hit in hits[:candidates]]
            order = await rerank(question.text, passages, likelihood, candidates)
            took = (time.perf_counter() - began) * 1000
        done += 1
        if on_progress is not None:
            on_progress(done, len(questions), RERANKED)
        return [Hit(passage, -float(rank)) for rank, passage in enumerate(order)], took

    pairs = await asyncio.gather(*(one(q, hits) for q, hits in zip(questions, found, strict=True)))
    return [ranked for ranked, _ in pairs], [took for _, took in pairs]
