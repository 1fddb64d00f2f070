"""Corpus reader: tables, documents and folders of documents, on disk or in S3, cut into passages."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.datasets.keys import KeyCheck
from graftwork.datasets.readers import no_rows, read_records, require_new
from graftwork.datasets.rows import passage_keys, read_passages, read_text
from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.storage.store import Store, open_uri, read_uri

# Documents (Markdown, HTML, text, PDF) as headings and paragraphs in reading order.

_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")


@dataclass(frozen=True, slots=True)
class Block:
    """A heading (`level` 1 to 6) or a paragraph (0)."""

    level: int
    text: str


def blocks_of(name: str, content: bytes) -> list[Block]:
    """Blocks of a file by the ending of its name. Raises DataError: not UTF-8, an unreadable PDF, another ending."""
    return READERS[suffix_of(name)](name, content)


def suffix_of(name: str) -> str:
    """`.md` of `Guide.MD`; empty where there is none."""
    head, dot, tail = name.rpartition("/")[2].rpartition(".")
    return f".{tail.lower()}" if dot and head else ""


def _markdown(name: str, content: bytes) -> list[Block]:
    return list(_paragraphs(_decode_utf8(name, content), headings=True))


def _text(name: str, content: bytes) -> list[Block]:
    return list(_paragraphs(_decode_utf8(name, content), headings=False))


def _html(name: str, content: bytes) -> list[Block]:
    reader = _HtmlBlocks()
    reader.feed(_decode_utf8(name, content))
    reader.close()
    return reader.finish()


def _pdf(name: str, content: bytes) -> list[Block]:
    """Each page is headed by its number, so that a citation can be looked up."""
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError:
        raise DataError(
            name, "pypdf is not installed", "PDF files are read by pypdf", "pip install 'pypdf>=6'"
        ) from None
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(content)).pages]
    except (PyPdfError, ValueError, KeyError, TypeError, OSError, RecursionError, NotImplementedError) as error:
        raise DataError(
            name,
            f"it cannot be read ({type(error).__name__}: {error})"[:400],
            "a PDF is whole and not encrypted",
            "repair the file, or leave it out",
        ) from error
    blocks: list[Block] = []
    for number, text in enumerate(pages, start=1):
        if text.strip():
            blocks += [Block(1, f"page {number}"), *_paragraphs(text, headings=False)]
    if not blocks:
        raise DataError(
            name,
            f"its {len(pages)} pages hold no text",
            "a scanned PDF is pictures of text",
            "run it through OCR first, or leave it out",
        )
    return blocks


READERS: dict[str, Callable[[str, bytes], list[Block]]] = {
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".txt": _text,
    ".text": _text,
    ".rst": _text,
    ".pdf": _pdf,
}
"""File endings that are read as documents."""


def _decode_utf8(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name} line {line}", f"it is not UTF-8 ({error.reason})", "documents are UTF-8", "convert the file"
        ) from error


def _paragraphs(text: str, *, headings: bool) -> Iterator[Block]:
    """Runs of lines between empty ones; a fenced block of code is one paragraph, whatever stands in it."""
    lines: list[str] = []
    fence = ""
    for line in [*text.splitlines(), ""]:
        mark = _FENCE.match(line) if headings else None
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = _HEADING.match(line) if headings and not fence else None
        if heading or not (line.strip() or fence):
            if lines:
                yield Block(0, "\n".join(lines))
            lines = []
            if heading and heading[2]:
                yield Block(len(heading[1]), heading[2])
        else:
            lines.append(line.rstrip())
    if lines:
        yield Block(0, "\n".join(lines))


_SILENT = frozenset({"script", "style", "template", "noscript", "head"})
_INLINE_TAGS = """
a abbr b bdi bdo cite code data dfn del em font i img ins kbd label mark q s samp small span strong sub sup
time u var wbr
"""
_INLINE = frozenset(_INLINE_TAGS.split())


class _HtmlBlocks(HTMLParser):
    """Text between block elements is a paragraph, in h1 to h6 a heading; what a browser doesn't show is left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._blocks: list[Block] = []
        self._text: list[str] = []
        self._level, self._silent = 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SILENT:
            self._silent += 1
        if tag not in _INLINE:
            self._end(int(tag[1]) if re.fullmatch("h[1-6]", tag) else 0)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE:
            self._end(self._level)

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT:
            self._silent = max(0, self._silent - 1)
        if tag not in _INLINE:
            self._end(0)

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._text.append(data)

    def finish(self) -> list[Block]:
        """The blocks of what was fed."""
        self._end(0)
        return self._blocks

    def _end(self, next_level: int) -> None:
        text = " ".join("".join(self._text).split())
        if text:
            self._blocks.append(Block(self._level, text))
        self._text, self._level = [], next_level


# Passages of documents.

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
