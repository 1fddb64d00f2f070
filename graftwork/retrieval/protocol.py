"""Protocols of a retriever and of its spec class: result type of a search, and the keys that all kinds have.

A retriever is one file of this folder with its spec class, a `RetrieverKind`, and the index that the class opens.
`retriever.RetrieverSpec` is the union of the spec classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.prompts.render import Passage

if TYPE_CHECKING:
    from graftwork.retrieval.bm25 import LexicalIndex


@dataclass(frozen=True, slots=True)
class Hit:
    """A found passage; a higher score is a better match. Scores of different kinds of retrieval don't compare."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """Searches one corpus. Safe to use from several threads."""

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages, best first. Any text is a query."""
        ...

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        ...


class RerankSpec(Spec):
    """Order what was found by how likely the base finds the question after reading each passage."""

    candidates: int = Field(default=10, ge=2, le=64)
    """Passages read by the model for each question; each costs its prefill."""


class RetrieverKind(Spec):
    """Source of an arm's context."""

    corpus: str
    """Passages: JSONL, CSV or Parquet rows (`id`, `text`), documents (Markdown, HTML, text, PDF) or a folder of them,
    or an index made by `graftwork rag index`: a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages put before the question, at most: only those that share a word with it."""
    context_tokens: int | None = Field(default=None, ge=8)
    """Room for the passages in tokens. One that does not fit is left out whole and reported; null leaves out none."""
    rerank: RerankSpec | None = None

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> Self:
        if self.rerank is not None and self.rerank.candidates <= self.k:
            raise ValueError(f"rerank.candidates={self.rerank.candidates} leaves nothing to choose for k={self.k}")
        return self

    def open(self, lexical: "LexicalIndex", folder: Path | None) -> Retriever:
        """Return the retriever. lexical: index of the corpus. folder: version of a published index; None: no index."""
        raise NotImplementedError(f"{type(self).__name__}.open")
