"""Spec of an index: sources, chunking, retrievers, and the questions that measure them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graftwork.base.source import BaseSpec
from graftwork.config import Spec
from graftwork.quantization import QuantSpec
from graftwork.retrieval.corpus import ChunkSpec, SourceSpec
from graftwork.retrieval.dense import MINILM, VectorKind
from graftwork.retrieval.embedder import EmbedderSpec
from graftwork.retrieval.index_store import IndexHome
from graftwork.retrieval.protocol import RerankSpec
from graftwork.retrieval.retriever import KINDS, AutoSpec, Kind, RetrieverSpec
from graftwork.storage.store import DEFAULT_ROOT, NAME_PATTERN


class RagRerankSpec(RerankSpec):
    """Measure lexical retrieval with a rerank by this base, too."""

    base: BaseSpec
    quant: QuantSpec = QuantSpec()


class RagSpec(Spec):
    """An index over some sources, and the questions that say which retriever to use on it."""

    kind: Literal["rag"] = "rag"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    sources: tuple[SourceSpec, ...]
    """Tables (JSONL, CSV, Parquet), documents (Markdown, HTML, text, PDF) and folders of documents."""
    chunk: ChunkSpec = ChunkSpec()
    """Passage length and overlap of documents."""
    retrievers: tuple[Kind, ...] = ("lexical",)
    """Kinds of retrieval that the index supports and `eval` compares; lexical is always included."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages that come to the model."""
    embedder: EmbedderSpec = EmbedderSpec(uri=MINILM)
    """Model of the vectors."""
    dense_weight: float = Field(default=0.25, gt=0, le=1)
    """Weight of a rank among the vectors, relative to one among the words; for hybrid."""
    rerank: RagRerankSpec | None = None
    questions: str | None = None
    """JSONL for `eval`: `id`, `question` (or `messages`, `prompt`), `doc_id` (one or a list), `answers` or `gold`."""
    limit: int | None = Field(default=None, ge=1)
    """Ask the first N questions."""
    seed: int = 0
    """Of the resampling in `eval`."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if not self.sources:
            raise ValueError("sources is empty: an index is made of at least one")
        if not self.needs_vectors and self.embedder != type(self).model_fields["embedder"].default:
            raise ValueError("embedder cannot take effect without dense or hybrid in retrievers")
        if "hybrid" not in self.retrievers and "dense_weight" in self.model_fields_set:
            raise ValueError("dense_weight cannot take effect without hybrid in retrievers")
        if self.rerank is not None and self.rerank.candidates <= self.k:
            raise ValueError(f"rerank.candidates={self.rerank.candidates} leaves nothing to choose for k={self.k}")
        return self

    @property
    def needs_vectors(self) -> bool:
        """Return whether passages are embedded."""
        return any(issubclass(KINDS[kind], VectorKind) for kind in self.retrievers)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds that are compared, lexical first."""
        return ("lexical", *(kind for kind in dict.fromkeys(self.retrievers) if kind != "lexical"))

    @property
    def home(self) -> IndexHome:
        """Location of the index."""
        return IndexHome.from_root(self.root, self.name)

    def made_from(self) -> str:
        """Digest of what decides the passages: an index made from anything else is another one."""
        return type(self)(name="x", sources=self.sources, chunk=self.chunk).identity()

    def retriever(self, kind: Kind | Literal["auto"]) -> RetrieverSpec:
        """One of its retrievers, as an arm would name it."""
        auto = AutoSpec(
            kind="auto",
            corpus=self.home.store.uri,
            k=self.k,
            embedder=self.embedder,
            dense_weight=self.dense_weight,
        )
        return auto if kind == "auto" else auto.chosen(kind)
