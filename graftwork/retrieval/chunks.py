"""Blocks become passages: whole paragraphs as far as they fit, under their headings, each beginning with the end of
the one before.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import Field, model_validator

from graftwork.chat import Passage
from graftwork.config import Spec
from graftwork.retrieval.documents import Block

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


class ChunkSpec(Spec):
    """How long texts are cut into passages, in characters: 800 are about 200 tokens of English."""

    max_chars: int = Field(default=800, ge=50)
    """Longest passage, its headings not counted."""
    overlap_chars: int = Field(default=120, ge=0)
    """So much of the end of a passage, at most, begins the next one of the same section."""

    @model_validator(mode="after")
    def _moves_on(self) -> Self:
        if self.overlap_chars * 2 > self.max_chars:
            raise ValueError(f"overlap_chars={self.overlap_chars} is more than half of max_chars={self.max_chars}")
        return self


def passages_of(document: str, blocks: Sequence[Block], spec: ChunkSpec) -> list[Passage]:
    """Passages `DOCUMENT#1`, `DOCUMENT#2`, ... A passage never crosses a heading, and is headed by those above it."""
    texts = [text for path, paragraphs in _sections(blocks) for text in _section(path, paragraphs, spec)]
    return [Passage(f"{document}#{number}", text) for number, text in enumerate(texts, start=1)]


def document_of(passage_id: str) -> str:
    """`guide.md` of `guide.md#3`; other ids as they are."""
    head, mark, tail = passage_id.rpartition("#")
    return head if mark and tail.isdigit() else passage_id


def _sections(blocks: Sequence[Block]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(headings from the top down, paragraphs below them); a heading with nothing below stands with its own text."""
    path: list[Block] = []
    paragraphs: list[str] = []
    for place, block in enumerate(blocks):
        if block.level == 0:
            paragraphs.append(block.text)
            continue
        if paragraphs:
            yield tuple(above.text for above in path), paragraphs
        path, paragraphs = [*(above for above in path if above.level < block.level), block], []
        below = blocks[place + 1] if place + 1 < len(blocks) else None
        if below is None or 0 < below.level <= block.level:
            yield tuple(above.text for above in path[:-1]), [block.text]
    if paragraphs:
        yield tuple(above.text for above in path), paragraphs


def _section(path: Sequence[str], paragraphs: Sequence[str], spec: ChunkSpec) -> Iterator[str]:
    heading = " > ".join(path) + "\n" if path else ""
    pieces = [piece for paragraph in paragraphs for piece in _pieces(paragraph, spec.max_chars)]
    held: list[str] = []
    for piece in pieces:
        if held and _size([*held, piece]) > spec.max_chars:
            yield heading + "\n".join(held)
            held = _tail(held, min(spec.overlap_chars, spec.max_chars - len(piece) - 1))
        held.append(piece)
    if held:
        yield heading + "\n".join(held)


def _pieces(text: str, limit: int) -> Iterator[str]:
    """A paragraph whole, or its sentences, or, where one alone is too long, its words; a longer word is cut."""
    if len(text) <= limit:
        yield text
        return
    for sentence in filter(None, _SENTENCE_END.split(text)):
        if len(sentence) <= limit:
            yield sentence
            continue
        line = ""
        for word in sentence.split():
            while len(word) > limit:
                if line:
                    yield line
                line, word = "", word
                yield word[:limit]
                word = word[limit:]
            if line and len(line) + 1 + len(word) > limit:
                yield line
                line = ""
            line = f"{line} {word}" if line else word
        if line:
            yield line


def _tail(pieces: Sequence[str], room: int) -> list[str]:
    """The last whole sentences of a passage that fit the room."""
    kept: list[str] = []
    for sentence in reversed([part for piece in pieces for part in _SENTENCE_END.split(piece) if part]):
        if _size([sentence, *kept]) > room:
            break
        kept.insert(0, sentence)
    return kept


def _size(pieces: Sequence[str]) -> int:
    return sum(map(len, pieces)) + len(pieces) - 1
