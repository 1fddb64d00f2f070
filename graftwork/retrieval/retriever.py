"""Union of the retrievers that an arm may name, retriever that follows a published index, contexts of training rows."""

import logging
import math
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from graftwork.datasets.rows import ContextSpec, DatasetRow
from graftwork.errors import DataError, StorageError
from graftwork.prompts.render import Passage
from graftwork.retrieval.bm25 import LexicalIndex, LexicalSpec, lexical_of
from graftwork.retrieval.corpus import ChunkSpec, SourceSpec, read_corpus
from graftwork.retrieval.dense import DenseSpec, VectorKind
from graftwork.retrieval.hybrid import DenseWeight, HybridSpec
from graftwork.retrieval.index_store import LEXICAL_FILE, IndexHome, IndexManifest, RetrieverChoice
from graftwork.retrieval.protocol import Hit, Retriever

Kind = Literal["lexical", "dense", "hybrid"]
_Measured = LexicalSpec | DenseSpec | HybridSpec
KINDS: dict[str, type[_Measured]] = dict(zip(get_args(Kind), get_args(_Measured), strict=True))
"""Spec class of each kind that an index can have and `graftwork rag eval` compares."""


class AutoSpec(VectorKind):
    """The kind that `graftwork rag eval` chose for the index."""

    kind: Literal["auto"]
    dense_weight: DenseWeight = 0.25
    """Weight of a rank among the vectors, relative to one among the words; for hybrid."""

    def chosen(self, kind: str) -> _Measured:
        """Return the spec of a kind with those of these keys that the kind has."""
        cls = KINDS[kind]
        keys = {key: value for key, value in self.model_dump().items() if key in cls.model_fields}
        return cls.model_validate({**keys, "kind": kind})


def _default_kind(value: Any) -> Any:
    return {"kind": "lexical", **value} if isinstance(value, Mapping) else value


RetrieverSpec = Annotated[_Measured | AutoSpec, Field(discriminator="kind"), BeforeValidator(_default_kind)]

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
    return spec.open(lexical_of(read_corpus([SourceSpec(uri=spec.corpus)], ChunkSpec())), None)


class LiveRetriever:
    """A published index. A search takes the version that was current within the last FRESH_S, whole."""

    def __init__(self, spec: RetrieverSpec, home: IndexHome) -> None:
        self._spec, self._home = spec, home
        self._lock = threading.Lock()
        self._looked_at = -math.inf
        self._state: tuple[str, RetrieverChoice | None] | None = None
        self._follow_current()

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
                self._follow_current()
            return self._retriever.search(query, k)

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        return self._latest().get(passage_id)

    def _latest(self) -> Retriever:
        """Return the open version; one thread at a time looks for a newer one."""
        if time.monotonic() - self._looked_at > FRESH_S and self._lock.acquire(blocking=False):
            try:
                self._follow_current()
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

    def _follow_current(self) -> None:
        manifest = self._home.current()
        state = (manifest.version, self._home.choice() if self._spec.kind == "auto" else None)
        if state != self._state:
            self._retriever = self._open(manifest, state[1])
            self._manifest, self._state = manifest, state
        self._looked_at = time.monotonic()

    def _open(self, manifest: IndexManifest, choice: RetrieverChoice | None) -> Retriever:
        spec = self._spec
        if spec.kind == "auto":
            spec = spec.chosen(choice.kind if choice else "lexical")
        elif isinstance(spec, VectorKind) and manifest.embedder is None:
            raise DataError(
                f"retriever.kind={spec.kind!r} over {spec.corpus}",
                "the index has no vectors",
                "dense and hybrid retrieval need them",
                "add dense to `retrievers:` and index again",
            )
        folder = self._home.folder(manifest)
        return spec.open(LexicalIndex.open(folder / LEXICAL_FILE), folder)


# Contexts of training rows: passages as the served retriever returns them, with the gold passage.


def training_context(spec: ContextSpec, seed: int) -> Callable[[DatasetRow], tuple[Passage, ...]]:
    """Row -> the passages it is trained with: gold and distractors in the order the retriever ranks them.

    Distractors are what the retriever finds next to the gold passage, so they are of the kind that it will bring when
    served. A gold passage that it misses takes the last place. Depends on (seed, row id) only, not on other rows.
    The call raises DataError for a row whose doc_id is missing or not in the corpus.
    """
    index = open_retriever(LexicalSpec(corpus=spec.corpus, k=spec.k))
    return lambda row: _training_context(row, spec, seed, index)


def _training_context(row: DatasetRow, spec: ContextSpec, seed: int, index: Retriever) -> tuple[Passage, ...]:
    chance = random.Random(f"{seed} {row.id}")
    plain, with_gold = chance.random() < spec.plain_rate, chance.random() < spec.gold_rate
    gold = index.get(row.doc_id) if row.doc_id is not None else None
    if gold is None:
        raise DataError(
            f"{row.where}: doc_id",
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
