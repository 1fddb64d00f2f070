"""bm25s and tantivy over the same passages and queries, in an interpreter of their own that knows nothing of graftwork.

    python benchmarks/rag_peers.py bm25s|tantivy IN.json OUT.json

IN: {"texts": [...], "queries": [...], "k": 5}. OUT: {"index_cpu_s", "query_ms": [...], "top": [[place, ...], ...]}.
Each with English stemming and stop words, its other settings as they come, one thread.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

Made = tuple[float, Callable[[str], list[int]]]
"""CPU-seconds of the index, and a search of it."""


def with_bm25s(texts: list[str], k: int) -> Made:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")

    def tokens(some: list[str]) -> Any:
        return bm25s.tokenize(some, stopwords="en", stemmer=stemmer, show_progress=False)

    began = time.process_time()
    index = bm25s.BM25()
    index.index(tokens(texts), show_progress=False)
    spent = time.process_time() - began

    def search(query: str) -> list[int]:
        found, _ = index.retrieve(tokens([query]), k=k, show_progress=False, n_threads=0)
        return [int(place) for place in found[0]]

    return spent, search


def with_tantivy(texts: list[str], k: int) -> Made:
    import tantivy

    began = time.process_time()
    schema = tantivy.SchemaBuilder()
    schema.add_text_field("text", stored=False, tokenizer_name="en_stem")
    schema.add_integer_field("place", stored=True)
    index = tantivy.Index(schema.build(), path=tempfile.mkdtemp(prefix="peers-"))
    writer = index.writer(heap_size=128_000_000, num_threads=1)
    for place, text in enumerate(texts):
        writer.add_document(tantivy.Document(text=text, place=place))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    spent = time.process_time() - began
    searcher = index.searcher()

    def search(query: str) -> list[int]:
        words = [word for word in re.findall(r"[^\W_]+", query.lower()) if word not in SILENT]
        parsed = index.parse_query(" ".join(words), ["text"])
        return [searcher.doc(address)["place"][0] for _, address in searcher.search(parsed, k).hits]

    return spent, search


SILENT = frozenset(
    re.findall(
        r"\w+",
        """
    a about an and are as at be but by do does for from had has have how i in is it its many me more of on or that the
    their there this to was were what when where which who whom why will with you
""",
    )
)


def main() -> None:
    name, source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        given = json.load(file)
    spent, search = {"bm25s": with_bm25s, "tantivy": with_tantivy}[name](given["texts"], given["k"])
    search(given["queries"][0])
    times, top = [], []
    for query in given["queries"]:
        began = time.perf_counter()
        top.append(search(query))
        times.append((time.perf_counter() - began) * 1000)
    with open(target, "w", encoding="utf-8") as file:
        json.dump({"index_cpu_s": spent, "query_ms": times, "top": top}, file)


if __name__ == "__main__":
    main()
