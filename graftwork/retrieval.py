"""Lexical retrieval: BM25 by SQLite FTS5 over a corpus of passages, one file, no server."""

import hashlib
import os
import random
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from graftwork.build_once import build_once
from graftwork.chat import Passage
from graftwork.config import Spec
from graftwork.data import ContextSpec, Row, read_passages
from graftwork.errors import DataError
from graftwork.storage import cache_root


class RetrieverSpec(Spec):
    """Where an arm's context comes from."""

    kind: Literal["lexical"] = "lexical"
    corpus: str
    """JSONL of passages (`id`, `text`): a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages put before the question."""


_SILENT_WORDS = """
a about all an and any are as at be by can could do does for from give has have how i in into is it its me my of on or
our please s should show tell that the their there these this those to up was we what when where which who whose why
will with would you your
"""
STOP_WORDS = frozenset(_SILENT_WORDS.split())
"""Words that say nothing of what is asked. A query with every word costs 100 times the time at 100,000 passages."""

_WORD = re.compile(r"\w+")
_FILE = "index.sqlite"
_COMMON_SHARE = 0.05
"""A word that stands in more of the passages is left out of a query that has rarer ones: it costs most and says least."""
_FORM = "fts5-2"
"""Changes when the index would be built differently, so that no old file is taken for a new one."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A found passage; a higher score is a better match."""

    passage: Passage
    score: float


class LexicalIndex:
    """An index file, opened read-only. Safe to use from several threads."""

    def __init__(self, path: Path, digest: str, size: int, common: frozenset[str]) -> None:
        self.path, self.digest, self._size, self._common = path, digest, size, common
        self._connections = threading.local()

    @classmethod
    def build(cls, passages: Sequence[Passage], path: Path) -> "LexicalIndex":
        """Write the index file atomically and open it. Raises DataError on an id that stands twice."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.unlink(missing_ok=True)
        connection = sqlite3.connect(unfinished)
        try:
            _fill(connection, passages)
        except sqlite3.IntegrityError as error:
            raise DataError("corpus", f"a passage id stands twice ({error})", "ids of passages differ") from error
        finally:
            connection.close()
        unfinished.replace(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "LexicalIndex":
        """Open an index file. Raises DataError when it isn't one."""
        if not path.is_file():
            raise DataError(f"index {path}", "no such file", "an index is built from a corpus by `open_index`")
        try:
            connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            found = dict(connection.execute("SELECT key, value FROM about"))
            common = frozenset(word for (word,) in connection.execute("SELECT word FROM common"))
            connection.close()
        except sqlite3.Error as error:
            raise DataError(
                f"index {path}",
                f"it cannot be read ({error})",
                "an index is one SQLite file",
                "delete it: it is built again",
            ) from error
        return cls(path, found["digest"], int(found["size"]), common)

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages, best first. Any text is a query; nothing in it is syntax."""
        words = _words(query, self._common)
        if not words:
            return []
        match = " OR ".join(f'"{word}"' for word in words)
        rows = self._connection().execute(
            "SELECT p.id, p.text, -bm25(words) FROM words JOIN passages p ON p.rowid = words.rowid "
            "WHERE words MATCH ? ORDER BY bm25(words), p.rowid LIMIT ?",
            (match, k),
        )
        return [Hit(Passage(id_, text), score) for id_, text, score in rows]

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        row = self._connection().execute("SELECT id, text FROM passages WHERE id = ?", (passage_id,)).fetchone()
        return Passage(*row) if row else None

    def at(self, position: int) -> Passage:
        """The passage at a position of the corpus, 0 <= position < len."""
        row = self._connection().execute("SELECT id, text FROM passages WHERE rowid = ?", (position + 1,)).fetchone()
        return Passage(*row)

    def __len__(self) -> int:
        return self._size

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return LexicalIndex.open, (self.path,)

    def _connection(self) -> sqlite3.Connection:
        """One connection a thread: SQLite's are not shared."""
        found: sqlite3.Connection | None = getattr(self._connections, "open", None)
        if found is None:
            found = self._connections.open = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        return found


def open_index(corpus_uri: str) -> LexicalIndex:
    """The index of a corpus, built once per content in the cache. Raises DataError, StorageError."""
    passages = read_passages(corpus_uri)
    folder = cache_root() / "indexes" / f"{_FORM}-{_digest(passages)[:32]}"
    build_once(folder, lambda empty: _discard(LexicalIndex.build(passages, empty / _FILE)))
    return LexicalIndex.open(folder / _FILE)


def training_contexts(rows: Sequence[Row], spec: ContextSpec, seed: int) -> list[tuple[Passage, ...]]:
    """For each row the passages it is trained with: gold and distractors in the order the retriever ranks them.

    A gold passage that the retriever misses takes a random place among the k; `gold_rate` and `plain_rate` say how many
    rows go without it or without any. Raises DataError where a row names no gold passage, or one that the corpus lacks.
    """
    index = open_index(spec.corpus)
    chance = random.Random(seed)
    return [_context(number, row, spec, index, chance) for number, row in enumerate(rows, start=1)]


def _context(
    number: int, row: Row, spec: ContextSpec, index: LexicalIndex, chance: random.Random
) -> tuple[Passage, ...]:
    plain, with_gold, place = (
        chance.random() < spec.plain_rate,
        chance.random() < spec.gold_rate,
        chance.randrange(spec.k),
    )
    if plain:
        return ()
    if row.doc_id is None:
        raise DataError(
            f"row {number} (id {row.id!r}): doc_id",
            "missing",
            "data.context needs the gold passage of each row",
            "add doc_id, or leave data.context out",
        )
    gold = index.get(row.doc_id)
    if gold is None:
        raise DataError(f"row {number} (id {row.id!r}): doc_id={row.doc_id!r}", f"no such passage in {spec.corpus}",
                        "doc_id is the id of a passage of the corpus")  # fmt: skip
    query = next(message.content for message in reversed(row.messages) if message.role == "user")
    found = [hit.passage for hit in index.search(query, spec.k)]
    ranked = [passage for passage in found if passage.id != gold.id]
    if not with_gold:
        return tuple(_filled(ranked, spec.k, {gold.id}, index, chance))
    rank = next((i for i, passage in enumerate(found) if passage.id == gold.id), place)
    others = _filled(ranked, spec.k - 1, {gold.id}, index, chance)
    return (*others[:rank], gold, *others[rank:])


def _filled(
    ranked: list[Passage], k: int, without: set[str], index: LexicalIndex, chance: random.Random
) -> list[Passage]:
    """The first k, and random passages where the retriever found fewer."""
    chosen = ranked[:k]
    taken = without | {passage.id for passage in chosen}
    while len(chosen) < min(k, len(index) - len(without)):
        passage = index.at(chance.randrange(len(index)))
        if passage.id not in taken:
            chosen.append(passage)
            taken.add(passage.id)
    return chosen


def _words(text: str, common: frozenset[str]) -> list[str]:
    """Words of a query, once each; those that say little are left out unless there is nothing else."""
    words = list(dict.fromkeys(word.lower() for word in _WORD.findall(text)))
    telling = [word for word in words if word not in STOP_WORDS]
    rare = [word for word in telling if word not in common]
    return rare or telling or words


def _common_words(passages: Sequence[Passage]) -> list[str]:
    counts = Counter(word for passage in passages for word in {word.lower() for word in _WORD.findall(passage.text)})
    return sorted(word for word, count in counts.items() if count > max(50, _COMMON_SHARE * len(passages)))


def _fill(connection: sqlite3.Connection, passages: Sequence[Passage]) -> None:
    connection.executescript(
        "CREATE TABLE passages (id TEXT UNIQUE NOT NULL, text TEXT NOT NULL);"
        "CREATE VIRTUAL TABLE words USING fts5"
        "(text, content='passages', tokenize=\"porter unicode61 remove_diacritics 2\");"
        "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT);"
        "CREATE TABLE common (word TEXT PRIMARY KEY);"
    )
    connection.executemany("INSERT INTO passages VALUES (?, ?)", ((p.id, p.text) for p in passages))
    connection.execute("INSERT INTO words(words) VALUES ('rebuild')")
    connection.execute("INSERT INTO words(words) VALUES ('optimize')")
    about = (("digest", _digest(passages)), ("size", str(len(passages))))
    connection.executemany("INSERT INTO about VALUES (?, ?)", about)
    connection.executemany("INSERT INTO common VALUES (?)", ((word,) for word in _common_words(passages)))
    connection.commit()


def _digest(passages: Sequence[Passage]) -> str:
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(f"{len(passage.id)} {len(passage.text)} {passage.id}{passage.text}".encode())
    return digest.hexdigest()


def _discard(_index: LexicalIndex) -> None:
    """`build_once` wants a builder that returns nothing."""
