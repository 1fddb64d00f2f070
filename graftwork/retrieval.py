"""Lexical retrieval: BM25 by SQLite FTS5 over a corpus of passages, one file, no server."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from graftwork.chat import Passage
from graftwork.config import Spec
from graftwork.data import ContextSpec, Row


class RetrieverSpec(Spec):
    """Where an arm's context comes from."""

    kind: Literal["lexical"] = "lexical"
    corpus: str
    """JSONL of passages (`id`, `text`): a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages put before the question."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A found passage; a higher score is a better match."""

    passage: Passage
    score: float


class LexicalIndex:
    """An index file, opened read-only. Safe to use from several threads."""

    digest: str
    """sha256 of the corpus."""

    @classmethod
    def build(cls, passages: Sequence[Passage], path: Path) -> "LexicalIndex":
        """Write the index file atomically and open it."""
        raise NotImplementedError

    @classmethod
    def open(cls, path: Path) -> "LexicalIndex":
        """Open an index file. Raises DataError when it isn't one."""
        raise NotImplementedError

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages, best first. Any text is a query; nothing in it is syntax."""
        raise NotImplementedError

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


def open_index(corpus_uri: str) -> LexicalIndex:
    """The index of a corpus, built once per content in the cache. Raises DataError, StorageError."""
    raise NotImplementedError


def training_contexts(rows: Sequence[Row], spec: ContextSpec, seed: int) -> list[tuple[Passage, ...]]:
    """For each row the passages it is trained with: gold and distractors in the order the retriever ranks them."""
    raise NotImplementedError
