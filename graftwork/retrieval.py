"""Lexical retrieval: BM25 by SQLite FTS5 over a corpus of passages, one file, no server.

Words are stemmed and case is folded, but codes (ZPPP, A320) are indexed once more as they stand, so that they match
exactly and weigh more. A query is data: it is cut into words, and each is quoted.
"""

import hashlib
import random
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from graftwork.build_once import build_once
from graftwork.chat import Passage
from graftwork.config import Spec, canonical_json
from graftwork.data import ContextSpec, Row, read_passages
from graftwork.errors import DataError
from graftwork.storage import cache_root

_SILENT_WORDS = """
a about all also am an and any are as at be been by can could did do does for from get give had has have how i if in
into is it its like look me more my need no not of on one or our please said says should show so some tell than that the
their them then there these they this those to up us was we were what when where which who whose why will with would you
your
"""
STOP_WORDS = frozenset(_SILENT_WORDS.split())
"""Words that say nothing of the topic; dropped from queries unless written in capitals, as a code may be."""
COMMON_SHARE = 0.05
"""A word in a larger share of the passages is dropped from a query that has rarer ones: it costs most, says least."""
_COMMON_AT_LEAST = 100
MAX_QUERY_WORDS = 64
_CODE_WEIGHT = 4.0
_WORD = re.compile(r"[^\W_]+")
_FORM = "fts5-5"
"""Changes when the index is built differently, so that no old file is taken for a new one."""
_SEARCH = """
SELECT p.id, p.text, -f.rank FROM (SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?) f
JOIN passages p ON p.number = f.rowid ORDER BY f.rank, f.rowid
"""


class RetrieverSpec(Spec):
    """Where an arm's context comes from."""

    kind: Literal["lexical"] = "lexical"
    corpus: str
    """JSONL of passages (`id`, `text`): a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages put before the question, at most: only those that share a word with it."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A found passage; a higher score is a better match."""

    passage: Passage
    score: float


class LexicalIndex:
    """An index file, opened read-only. Safe to use from several threads: each has its own connection."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        try:
            settings = dict(self._connection().execute("SELECT key, value FROM settings").fetchall())
        except sqlite3.DatabaseError as error:
            raise DataError(f"index {path}", f"it is no index ({error})", "an index is made by LexicalIndex.build",
                            "delete it: it is built again from the corpus") from error  # fmt: skip
        self.digest: str = settings["digest"]
        """sha256 of the corpus."""
        self._size = int(settings["size"])
        self._common = frozenset(settings["common"].split())

    @classmethod
    def build(cls, passages: Sequence[Passage], path: Path) -> "LexicalIndex":
        """Write the index file (replaced atomically) and open it. 28,000 short passages take about a second."""
        unfinished = path.with_name(f".tmp-{path.name}")
        unfinished.unlink(missing_ok=True)
        connection = sqlite3.connect(unfinished)
        try:
            _write(connection, passages)
        finally:
            connection.close()
        unfinished.replace(path)
        return cls(path)

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
            found = self._connection().execute(_SEARCH, (" OR ".join(terms), k)).fetchall()
            if found:
                return [Hit(Passage(identity, text), score) for identity, text, score in found]
        return []

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        row = self._connection().execute("SELECT id, text FROM passages WHERE id = ?", (passage_id,)).fetchone()
        return Passage(*row) if row else None

    def __len__(self) -> int:
        return self._size

    def __reduce__(self) -> "tuple[type[LexicalIndex], tuple[Path]]":
        return LexicalIndex, (self._path,)  # another process opens the file itself

    def _narrow_to_wide(self, query: str) -> Iterator[list[str]]:
        """FTS5 terms of the telling words; where they find nothing, those of the common words too; then of all."""
        words = list(dict.fromkeys(_WORD.findall(query)))[:MAX_QUERY_WORDS]
        codes = [f'code : "{_code_token(word)}"' for word in words if _is_code(word)]
        telling = [word for word in words if _is_code(word) or word.lower() not in STOP_WORDS]
        rare = [word for word in telling if word.lower() not in self._common]
        for choice in (rare, telling, words):
            if choice:
                yield codes + [f'text : "{word.lower()}"' for word in choice]

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            self._local.connection = connection
        return connection


def open_index(corpus_uri: str) -> LexicalIndex:
    """The index of a corpus, built once per content in the cache. Raises DataError, StorageError."""
    passages = read_passages(corpus_uri)
    folder = cache_root() / "indexes" / f"{_FORM}-{corpus_digest(passages)[:32]}"

    def write(empty: Path) -> None:
        LexicalIndex.build(passages, empty / "index.sqlite")

    build_once(folder, write)
    return LexicalIndex.open(folder / "index.sqlite")


def corpus_digest(passages: Sequence[Passage]) -> str:
    """sha256 hex over ids and texts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(canonical_json([passage.id, passage.text]).encode() + b"\n")
    return digest.hexdigest()


def training_contexts(rows: Sequence[Row], spec: ContextSpec, seed: int) -> list[tuple[Passage, ...]]:
    """For each row the passages it is trained with: gold and distractors in the order the retriever ranks them.

    Distractors are what the retriever finds beside the gold passage, so they are of the kind that it will bring when
    served. A gold passage that it misses takes the last place. Depends on (seed, row id) only, not on other rows.
    Raises DataError for a row whose doc_id is missing or not in the corpus.
    """
    index = open_index(spec.corpus)
    return [_training_context(row, spec, seed, index) for row in rows]


def _training_context(row: Row, spec: ContextSpec, seed: int, index: LexicalIndex) -> tuple[Passage, ...]:
    chance = random.Random(f"{seed} {row.id}")
    plain, with_gold = chance.random() < spec.plain_rate, chance.random() < spec.gold_rate
    gold = index.get(row.doc_id) if row.doc_id is not None else None
    if gold is None:
        raise DataError(f"row {row.id}: doc_id", f"{row.doc_id!r} is no passage of {spec.corpus}",
                        "a row trained with context names its gold passage", "add doc_id, or drop data.context"
                        )  # fmt: skip
    if plain:
        return ()
    found = [hit.passage for hit in index.search(row.question[-1].content, spec.k + 1)]
    if not with_gold:
        return tuple([passage for passage in found if passage.id != gold.id][: spec.k])
    found = found[: spec.k]
    return tuple(found) if gold in found else (*found[: spec.k - 1], gold)


def _write(connection: sqlite3.Connection, passages: Sequence[Passage]) -> None:
    connection.executescript(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
        "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT);"
        "CREATE TABLE passages (number INTEGER PRIMARY KEY, id TEXT UNIQUE, text TEXT);"
        "CREATE VIRTUAL TABLE words USING fts5"
        "(text, code, content='', tokenize='porter unicode61 remove_diacritics 2');"
        f"INSERT INTO words(words, rank) VALUES ('rank', 'bm25(1.0, {_CODE_WEIGHT})');"
    )
    numbered = list(enumerate(passages, start=1))
    connection.executemany("INSERT INTO passages VALUES (?, ?, ?)", ((n, p.id, p.text) for n, p in numbered))
    connection.executemany(
        "INSERT INTO words(rowid, text, code) VALUES (?, ?, ?)", ((n, p.text, _codes(p.text)) for n, p in numbered)
    )
    common = " ".join(_common_words(passages))
    settings = {"digest": corpus_digest(passages), "size": str(len(passages)), "common": common}
    connection.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())
    connection.execute("INSERT INTO words(words) VALUES ('optimize')")
    connection.commit()


def _common_words(passages: Sequence[Passage]) -> list[str]:
    counts = Counter(word for passage in passages for word in set(_WORD.findall(passage.text.lower())))
    return sorted(word for word, count in counts.items() if count > max(_COMMON_AT_LEAST, COMMON_SHARE * len(passages)))


def _codes(text: str) -> str:
    return " ".join(_code_token(word) for word in _WORD.findall(text) if _is_code(word))


def _is_code(word: str) -> bool:
    """Capitals and digits, at least two characters and one capital: ZPPP, A320, not 42 and not Paris."""
    return len(word) > 1 and word.upper() == word and any(char.isupper() for char in word)


def _code_token(word: str) -> str:
    """The closing digit keeps the stemmer off."""
    return word.lower() + "0"
