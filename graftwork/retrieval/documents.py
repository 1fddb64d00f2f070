"""Readers of documents (Markdown, HTML, text, PDF) into headings and paragraphs in reading order."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser

from graftwork.errors import DataError

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
    return list(_paragraphs(_decoded(name, content), headings=True))


def _text(name: str, content: bytes) -> list[Block]:
    return list(_paragraphs(_decoded(name, content), headings=False))


def _html(name: str, content: bytes) -> list[Block]:
    reader = _HtmlBlocks()
    reader.feed(_decoded(name, content))
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


def _decoded(name: str, content: bytes) -> str:
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
_INLINE = frozenset(
    {
        "a",
        "abbr",
        "b",
        "bdi",
        "bdo",
        "cite",
        "code",
        "data",
        "dfn",
        "del",
        "em",
        "font",
        "i",
        "img",
        "ins",
        "kbd",
        "label",
        "mark",
        "q",
        "s",
        "samp",
        "small",
        "span",
        "strong",
        "sub",
        "sup",
        "time",
        "u",
        "var",
        "wbr",
    }
)


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
