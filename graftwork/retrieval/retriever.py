"""A retriever spec becomes a retriever; one over a published index follows it from version to version."""

import logging
import sqlite3
import threading
import time
from pathlib import Path

from graftwork.build_once import build_once
from graftwork.chat import Passage
from graftwork.errors import DataError, StorageError
from graftwork.retrieval.chunks import ChunkSpec
from graftwork.retrieval.dense import DenseIndex, shared_embedder, write_vectors
from graftwork.retrieval.hit import Hit, Retriever
from graftwork.retrieval.hybrid import HybridIndex
from graftwork.retrieval.lexical import LexicalIndex, corpus_digest, lexical_of
from graftwork.retrieval.sources import SourceSpec, read_corpus
from graftwork.retrieval.spec import RetrieverSpec
from graftwork.retrieval.versions import LEXICAL_FILE, IndexHome, IndexManifest, Kind
from graftwork.storage import cache_root

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
        raise DataError(f"retriever.kind='auto' over {spec.corpus}", "it is no index", "auto is what `graftwork rag "
                        "eval` chose for an index", "make one with `graftwork rag index`, or name the kind"
                        )  # fmt: skip
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
        """Who comes while another looks takes what there is."""
        if time.monotonic() - self._looked_at > FRESH_S and self._lock.acquire(blocking=False):
            try:
                self._look()
            except StorageError as error:  # what is open here still answers
                self._looked_at = time.monotonic()
                log.warning("index %s: could not be looked up, version %s goes on: %s", self._home.store.uri,
                            self._manifest.version, error.problem)  # fmt: skip
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
            raise DataError(f"retriever.kind={self._spec.kind!r} over {self._spec.corpus}", "the index has no vectors",
                            "dense and hybrid retrieval need them", "add dense to `retrievers:` and index again"
                            )  # fmt: skip
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
