"""Corpus reader: tables, documents and folders of documents, on disk or in S3, cut into passages."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.datasets.readers import KeyCheck, no_rows, read_records, require_new
from graftwork.datasets.rows import passage_keys, read_passages, read_text
from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.retrieval.documents import READERS, Block, blocks_of, suffix_of
from graftwork.storage.store import Store, open_uri, read_uri

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


class ChunkSpec(Spec):
    """Passage length and overlap of cut texts, in characters: 800 are about 200 tokens of English."""

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


TABLES = (".jsonl", ".csv", ".parquet")
"""File endings that are read as rows, one passage each."""
_ENDINGS = ", ".join([*TABLES, *sorted(READERS)])


class SourceSpec(Spec):
    """One table, one document, or a folder of documents. In YAML a plain string is its `uri`."""

    uri: str = Field(min_length=1)
    """A path, `file://`, `s3://` or `recipe://NAME/FILE`."""
    id: str = "id"
    """Column of a table that names the passage."""
    text: tuple[str, ...] = Field(default=("text",), min_length=1)
    """Columns that make the passage, one line each."""
    chunk: bool = False
    """Cut the rows of a table into passages too, as documents always are."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"uri": value}
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return {**value, "text": (value["text"],)}
        return value


def read_corpus(sources: Sequence[SourceSpec], chunk: ChunkSpec, ignored: list[str] | None = None) -> list[Passage]:
    """Passages of all sources in their order. ignored: takes a note on each table with columns that are not read.

    Raises DataError (also where two passages have one id), StorageError.
    """
    passages: list[Passage] = []
    seen: dict[str, str] = {}
    for source in sources:
        keys = passage_keys((source.id, *source.text))
        for passage in read_source(source, chunk, keys):
            if passage.id in seen:
                raise DataError(
                    f"{source.uri}: passage id {passage.id!r}",
                    f"it came before, from {seen[passage.id]}",
                    "ids are unique in an index",
                    "rename one, or leave one out",
                )
            seen[passage.id] = source.uri
            passages.append(passage)
        if ignored is not None:
            ignored += keys.note(source.uri)
    return passages


def read_source(source: SourceSpec, chunk: ChunkSpec, keys: KeyCheck | None = None) -> list[Passage]:
    """Passages of one source: at least one, each with text. keys: counts the columns that are not read.

    Raises DataError, StorageError.
    """
    suffix = suffix_of(source.uri)
    if suffix in TABLES:
        passages = _table(source, suffix, keys or passage_keys((source.id, *source.text)))
        if not source.chunk:
            return passages
        cut = (passages_of(row.id, [Block(0, part) for part in row.text.split("\n\n")], chunk) for row in passages)
        return [passage for parts in cut for passage in parts]
    found = [passage for name, content in _files(source.uri) for passage in _document(source.uri, name, content, chunk)]
    if not found:
        raise DataError(source.uri, "no text was found in it", "a corpus has at least one passage", "check the path")
    return found


def _document(uri: str, name: str, content: bytes, chunk: ChunkSpec) -> list[Passage]:
    try:
        return passages_of(name, blocks_of(name, content), chunk)
    except DataError as error:
        if uri.endswith(name):
            raise
        raise DataError(f"{uri}: {error.subject}", error.problem, error.rule, error.hint) from error


def _files(uri: str) -> Iterator[tuple[str, bytes]]:
    """(path below the folder, content) of the documents, sorted; of a single document its own name."""
    if suffix_of(uri) in READERS:
        content = read_text(uri).encode() if uri.startswith("recipe://") else read_uri(uri)
        yield uri.rpartition("/")[2], content
        return
    if uri.startswith("recipe://"):
        raise DataError(uri, "it is no kind of file that is read here", f"sources end in {_ENDINGS}, or are folders")
    store, key = open_uri(uri)
    tree = sorted(parts for parts in store.tree(key) if not any(part.startswith(".") for part in parts))
    documents = [parts for parts in tree if suffix_of(parts[-1]) in READERS]
    if not documents:
        found = "no such file or folder" if not tree else f"{len(tree)} files, none of them a document"
        raise DataError(uri, found, f"sources end in {_ENDINGS}, or are folders of documents", "check the path")
    for parts in documents:
        yield "/".join(parts), Store(store.path(key)).read_bytes(*parts)


def _table(source: SourceSpec, suffix: str, keys: KeyCheck) -> list[Passage]:
    if suffix == ".jsonl" and (source.id, source.text) == ("id", ("text",)):
        return read_passages(source.uri, keys)
    passages: list[Passage] = []
    seen: dict[str, int] = {}
    for number, record in read_records(source.uri):
        keys.check(record, f"{source.uri} row {number}")
        identity, text = _row(source, number, record)
        require_new(identity, number, seen, source.uri, key=source.id)
        passages.append(Passage(identity, text))
    if not passages:
        raise no_rows(source.uri, "a corpus has at least one passage")
    return passages


def _row(source: SourceSpec, number: int, record: dict[str, Any]) -> tuple[str, str]:
    for column in (source.id, *source.text):
        if column not in record:
            raise DataError(
                f"{source.uri} row {number}: {column}",
                f"no such column (found {', '.join(record)})",
                "a source names the columns of its id and its text",
                "set `id:` and `text:` of the source",
            )
    identity = record[source.id]
    if identity is None or isinstance(identity, bool | float) or str(identity) == "":
        raise DataError(
            f"{source.uri} row {number}: {source.id}", f"found {identity!r}", "an id is a string or a whole number"
        )
    text = "\n".join(str(record[column]) for column in source.text if record[column] not in (None, ""))
    if not text.strip():
        raise DataError(
            f"{source.uri} row {number}: {', '.join(source.text)}",
            "it is empty",
            "a passage holds text",
            "fill it, or leave the row out",
        )
    return str(identity), text
