"""Datasets: rows of conversations and passages of a corpus, read from JSONL and checked row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from graftwork.chat import Message, Passage, Prompt, PromptSpec
from graftwork.config import Spec


class ContextSpec(Spec):
    """Retrieved passages in the training rows, distractors among them (RAFT, arXiv 2403.10131)."""

    corpus: str
    """JSONL of passages (`id`, `text`): a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages a row."""
    gold_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of the rows with context whose gold passage is among the k."""
    plain_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the rows that get no context at all."""


class DataSpec(Spec):
    """What is learned from, and what is held out."""

    train: str
    """JSONL of rows: a path, `file://`, `s3://` or `recipe://NAME/train.jsonl`."""
    eval: str | None = None
    """Held-out rows of the same form."""
    train_rows: int | None = Field(default=None, ge=1)
    """Take the first so many rows; null takes all."""
    eval_rows: int | None = Field(default=None, ge=1)
    context: ContextSpec | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation. `doc_id` is the gold passage, `gold` the answer as an object, `asked` the fields given away."""

    id: str
    messages: tuple[Message, ...]
    doc_id: str | None = None
    gold: Mapping[str, Any] | None = None
    asked: tuple[str, ...] = ()


def read_rows(uri: str, *, limit: int | None = None, need: Literal["train", "eval"]) -> list[Row]:
    """Rows of a JSONL. `need="train"` wants a last assistant turn, `"eval"` a gold answer. Raises DataError."""
    raise NotImplementedError


def read_passages(uri: str) -> list[Passage]:
    """Passages of a JSONL with `id` and `text`. Raises DataError."""
    raise NotImplementedError


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 hex over the canonical rows, in order."""
    raise NotImplementedError


def resolve_prompt(spec: PromptSpec) -> Prompt:
    """Read the worked examples of a prompt. Raises DataError."""
    raise NotImplementedError


def read_text(uri: str) -> str:
    """Text behind a path, `file://`, `s3://` or `recipe://NAME/FILE` . Raises DataError, StorageError."""
    raise NotImplementedError
