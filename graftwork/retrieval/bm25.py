"""Lexical retrieval: BM25 by SQLite FTS5 over a corpus of passages, one file, no server.

Words are stemmed and case is folded, but codes (ZPPP, A320) are indexed once more as they stand, so that they match
exactly and weigh more. A query is data: it is cut into words, and each is quoted.

A changed corpus needs no new index: `derive` takes out what is gone and puts in what came, and the result answers
like an index built from scratch, scores and order included.
"""

import hashlib
import itertools
import re
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.retrieval.protocol import Hit, Retriever, RetrieverKind
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root

COMMON_SHARE = 0.05
"""A word in a larger share of the passages is dropped from a query that has rarer ones: it costs most, says least."""
_COMMON_AT_LEAST = 1000
"""In fewer passages a word is never common: it says something there, and costs little."""
SCORED_AT_MOST = 6000
"""Matches that a query may score, about 0.6 us each: beyond it the commonest words are dropped. One word alone that
stands in more passages is looked for in the first of them."""
MAX_QUERY_WORDS = 64
_CODE_WEIGHT = 4.0
FORM = "fts5-6"
"""Changes when the index is built differently, so that no old file is taken for a new one."""
_TABLES = f"""
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE passages (number INTEGER PRIMARY KEY, id TEXT UNIQUE, text TEXT);
CREATE TABLE spread (word TEXT PRIMARY KEY, passages INTEGER) WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5(text, code, content='', tokenize='porter unicode61 remove_diacritics 2');
INSERT INTO words(words, rank) VALUES ('rank', 'bm25(1.0, {_CODE_WEIGHT})');
"""
_SPREAD = """
INSERT INTO spread VALUES (?, ?) ON CONFLICT (word) DO UPDATE SET passages = passages + excluded.passages
"""
# bm25() by name with LIMIT takes half the time of ORDER BY rank, which carries every match through FTS5's own sorter
_SEARCH = f"""
SELECT p.id, p.text, -f.score FROM (
  SELECT number, score FROM (
    SELECT rowid AS number, bm25(words, 1.0, {_CODE_WEIGHT}) AS score FROM words WHERE words MATCH ? LIMIT ?
  ) ORDER BY score, number LIMIT ?
) f JOIN passages p ON p.number = f.number ORDER BY f.score, f.number
"""


# Difference between an index and a changed corpus.


STRIDE = 64
"""Between the numbers of neighbours, so that others fit in between. Below 128 a step takes one byte of the index."""

Numbered = tuple[int, Passage]


@dataclass(frozen=True)
class Changes:
    """Passages by the number that they have, or get, in the index. A changed text leaves and comes."""

    removed: tuple[Numbered, ...]
    added: tuple[Numbered, ...]
    kept: int


def numbered(passages: Sequence[Passage]) -> tuple[Numbered, ...]:
    """Numbers of a corpus that is indexed from scratch."""
    return tuple((STRIDE * place, passage) for place, passage in enumerate(passages, start=1))


def changes(old: Sequence[Numbered], new: Sequence[Passage]) -> Changes | None:
    """From `old` to `new`, numbers rising along `new`; None where that can't be had: what stays changed its order, or
    more came between two neighbours than fit.
    """
    known = {passage: number for number, passage in old}
    numbers = [known.get(passage) for passage in new]
    stay = [number for number in numbers if number is not None]
    if any(after <= before for before, after in zip(stay, stay[1:], strict=False)):
        return None
    added: list[Numbered] = []
    for start, end, floor, ceiling in _gaps(numbers):
        places = _spread(floor, ceiling, end - start)
        if places is None:
            return None
        added += zip(places, new[start:end], strict=True)
    still = set(stay)
    removed = tuple(pair for pair in old if pair[0] not in still)
    return Changes(removed, tuple(added), len(stay))


def _gaps(numbers: Sequence[int | None]) -> Iterator[tuple[int, int, int, int | None]]:
    """Runs without a number as [start, end), with the numbers before and behind them; None: nothing is behind."""
    floor, start = 0, 0
    for place, number in enumerate([*numbers, None]):
        last = place == len(numbers)
        if number is None and not last:
            continue
        if start < place:
            yield start, place, floor, number
        floor, start = number or 0, place + 1


def _spread(floor: int, ceiling: int | None, count: int) -> list[int] | None:
    """`count` numbers between the two, evenly; None where they don't fit."""
    if ceiling is None:
        return [floor + STRIDE * place for place in range(1, count + 1)]
    if ceiling - floor <= count:
        return None
    return [floor + (ceiling - floor) * place // (count + 1) for place in range(1, count + 1)]


class LexicalSpec(RetrieverKind):
    """BM25 over words and codes."""

    kind: Literal["lexical"] = "lexical"

    def open(self, lexical: "LexicalIndex", folder: Path | None) -> Retriever:
        """Return the index of the corpus itself."""
        return lexical


class LexicalIndex:
    """An index file, opened read-only. Safe to use from several threads: each has its own connection."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        try:
            settings = dict(self._connection().execute("SELECT key, value FROM settings").fetchall())
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"index {path}",
                f"it is no index ({error})",
                "an index is made by LexicalIndex.build",
                "delete it: it is built again from the corpus",
            ) from error
        self.digest: str = settings["digest"]
        """sha256 of the corpus."""
        self._size = int(settings["size"])

    @classmethod
    def build(cls, passages: Sequence[Passage], path: Path) -> "LexicalIndex":
        """Write the index file (replaced atomically) and open it. 100,000 short passages take 2 to 3 CPU-seconds."""

        def write(connection: sqlite3.Connection) -> None:
            connection.executescript(_TABLES)
            _apply(connection, Changes((), numbered(passages), 0))
            _settle(connection, passages)
            connection.execute("INSERT INTO words(words) VALUES ('optimize')")

        return cls._write_file(path, None, write)

    def derive(self, passages: Sequence[Passage], path: Path) -> "tuple[LexicalIndex, Changes]":
        """Write the index of a changed corpus to another file, from this one, and open it.

        What is gone leaves and what is new comes; all is rebuilt only where what stays changed its order.
        """
        found = changes(self.numbered(), passages)
        if found is None:
            return LexicalIndex.build(passages, path), Changes((), numbered(passages), 0)

        def write(connection: sqlite3.Connection) -> None:
            connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
            _apply(connection, found)
            _settle(connection, passages)

        return self._write_file(path, self._path, write), found

    @classmethod
    def open(cls, path: Path) -> "LexicalIndex":
        """Open an index file. Raises DataError when it isn't one."""
        if not path.is_file():
            raise DataError(f"index {path}", "it does not exist", "", "build it with LexicalIndex.build")
        return cls(path)

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages, best first; fewer where fewer share a word with the query. Any text is a query."""
        if k < 1:
            return []
        for terms in self._narrow_to_wide(query):
            asked = (" OR ".join(self._affordable(terms)), SCORED_AT_MOST, k)
            found = self._connection().execute(_SEARCH, asked).fetchall()
            if found:
                return [Hit(Passage(identity, text), score) for identity, text, score in found]
        return []

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        row = self._connection().execute("SELECT id, text FROM passages WHERE id = ?", (passage_id,)).fetchone()
        return Passage(*row) if row else None

    def numbered(self) -> list[Numbered]:
        """Every passage in the order of the corpus, with its number."""
        rows = self._connection().execute("SELECT number, id, text FROM passages ORDER BY number")
        return [(number, Passage(identity, text)) for number, identity, text in rows]

    def __len__(self) -> int:
        return self._size

    def __reduce__(self) -> "tuple[type[LexicalIndex], tuple[Path]]":
        return LexicalIndex, (self._path,)  # another process opens the file itself

    def _narrow_to_wide(self, query: str) -> Iterator[list[str]]:
        """FTS5 terms of the telling words; where they find nothing, those of the common words too; then of all."""
        words = list(dict.fromkeys(words_of(query)))[:MAX_QUERY_WORDS]
        codes = [f'code : "{code_token(word)}"' for word in words if is_code(word)]
        telling = [word for word in words if is_telling(word)]
        common = self._common([word.lower() for word in telling])
        rare = [word for word in telling if word.lower() not in common]
        for choice in (rare, telling, words):
            if choice:
                yield codes + [f'text : "{word.lower()}"' for word in choice]

    def _common(self, words: Sequence[str]) -> set[str]:
        limit = max(_COMMON_AT_LEAST, COMMON_SHARE * self._size)
        marks = ",".join("?" * len(words))
        rows = self._connection().execute(f"SELECT word, passages FROM spread WHERE word IN ({marks})", words)
        return {word for word, passages in rows if passages > limit}

    def _affordable(self, terms: Sequence[str]) -> list[str]:
        """The terms but the commonest, so that at most SCORED_AT_MOST passages match; one stays in any case."""
        count = "SELECT count(*) FROM words WHERE words MATCH ?"
        matches = {term: int(self._connection().execute(count, (term,)).fetchone()[0]) for term in terms}
        left = sorted(terms, key=lambda term: matches[term])
        while len(left) > 1 and sum(matches[term] for term in left) > SCORED_AT_MOST:
            left.pop()
        return [term for term in terms if term in left]

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            self._local.connection = connection
        return connection

    @classmethod
    def _write_file(cls, path: Path, start: Path | None, write: Callable[[sqlite3.Connection], None]) -> "LexicalIndex":
        """The file that `write` makes, of a copy of `start` or of nothing; it appears whole."""
        unfinished = path.with_name(f".tmp-{path.name}")
        unfinished.unlink(missing_ok=True)
        if start is not None:
            shutil.copyfile(start, unfinished)
        connection = sqlite3.connect(unfinished)
        try:
            write(connection)
            connection.commit()
        finally:
            connection.close()
        unfinished.replace(path)
        return cls(path)


def lexical_of(passages: Sequence[Passage]) -> LexicalIndex:
    """The index of these passages, built once per content in the cache."""
    folder = cache_root() / "indexes" / f"{FORM}-{corpus_digest(passages)[:32]}"

    def write(empty: Path) -> None:
        LexicalIndex.build(passages, empty / "index.sqlite")

    build_once(folder, write)
    return LexicalIndex.open(folder / "index.sqlite")


def corpus_digest(passages: Sequence[Passage]) -> str:
    """sha256 hex over ids and texts, in order."""
    digest = hashlib.sha256()
    for p in passages:
        digest.update(f"{len(p.id)} {len(p.text)} {p.id}{p.text}".encode())
    return digest.hexdigest()


def _apply(connection: sqlite3.Connection, found: Changes) -> None:
    """Delete a row: a contentless FTS5 table needs the old words to remove them."""
    gone, come = found.removed, found.added
    connection.executemany(
        "INSERT INTO words(words, rowid, text, code) VALUES ('delete', ?, ?, ?)",
        ((number, p.text, codes_of(p.text)) for number, p in gone),
    )
    connection.executemany("DELETE FROM passages WHERE number = ?", ((number,) for number, _ in gone))
    connection.executemany("INSERT INTO passages VALUES (?, ?, ?)", ((number, p.id, p.text) for number, p in come))
    connection.executemany(
        "INSERT INTO words(rowid, text, code) VALUES (?, ?, ?)",
        ((number, p.text, codes_of(p.text)) for number, p in come),
    )
    counts = _word_counts(come)
    counts.subtract(_word_counts(gone))
    connection.executemany(_SPREAD, ((word, count) for word, count in sorted(counts.items()) if count))


def _settle(connection: sqlite3.Connection, passages: Sequence[Passage]) -> None:
    settings = {"digest": corpus_digest(passages), "size": str(len(passages))}
    connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", settings.items())


def _word_counts(pairs: Sequence[Numbered]) -> Counter[str]:
    return Counter(itertools.chain.from_iterable(set(words_of(passage.text.lower())) for _, passage in pairs))


# Tokenisation: codes, stop words, the words of a query.


_SILENT_WORDS = """
a about all also am an and any are as at be been by can could did do does for from get give had has have how i if in
into is it its like look me more my need no not of on one or our please said says should show so some tell than that the
their them then there these they this those to up us was we were what when where which who whose why will with would you
your
"""
STOP_WORDS = frozenset(_SILENT_WORDS.split())
"""Words that say nothing of the topic; dropped from queries unless written in capitals, as a code may be."""
_WORD = re.compile(r"[^\W_]+")
_NO_SMALL_LETTER = re.compile(r"(?<![^\W_])[^\W_a-z]{2,}(?![^\W_])")
"""Words that may be codes: few, so that most of a text is passed over at the speed of the expression."""


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, as they are written."""
    return _WORD.findall(text)


def codes_of(text: str) -> str:
    """Codes of a text, as the index's own column of them holds them."""
    return " ".join(code_token(word) for word in _NO_SMALL_LETTER.findall(text) if is_code(word))


def is_code(word: str) -> bool:
    """Capitals and digits, at least two characters and one capital: ZPPP, A320, not 42 and not Paris."""
    return len(word) > 1 and word.upper() == word and any(char.isupper() for char in word)


def code_token(word: str) -> str:
    """The closing digit keeps the stemmer off."""
    return word.lower() + "0"


def is_telling(word: str) -> bool:
    """Return whether a query's word says something of its topic."""
    return is_code(word) or word.lower() not in STOP_WORDS
