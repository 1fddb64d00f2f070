"""Scorer `sql`: execution accuracy, the answer's rows against the gold query's on sqlite in memory.

The query may only read. What it costs is bounded by steps of sqlite's machine, rows, length of a value and growth of
the process, never by a clock: the score of a query is the same on a slow machine.
"""

import math
import re
import sqlite3
from collections import Counter
from contextlib import closing
from typing import Any, ClassVar, Literal

import psutil
from pydantic import Field

from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow, read_text
from graftwork.errors import DataError
from graftwork.metrics import Metric
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers.protocol import MetricName, ModelReply, Scorer

Table = list[tuple[Any, ...]]

_STRIDE = 2_000
_VALUE_BYTES = 1_000_000
_GROWTH_BYTES = 2**29
_READS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_MAKES = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA})
_ORDERED = re.compile(r"\border\s+by\b(?![^()]*\))", re.IGNORECASE)
"""ORDER BY outside of parentheses: then the order of the rows counts."""


class SqlSpec(Spec):
    """The answer is a query that finds the same rows as the gold query, on sqlite in memory, read-only."""

    kind: Literal["sql"]
    needs_gold: ClassVar[bool] = True
    name: MetricName = "sql"
    field: str = "sql"
    """Field of gold with the right query."""
    setup_field: str | None = "setup"
    """Field of gold with the statements that make the row's tables; null where `setup` has them for all rows."""
    setup: str | None = None
    """SQL file run before a row's own: a path, `file://`, `s3://`."""
    max_steps: int = Field(default=5_000_000, ge=1000)
    """Steps of sqlite's machine that a query may take, about 10 million a second: the same bound on any machine."""
    max_rows: int = Field(default=10_000, ge=1)
    """Rows that a query may return."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return SqlScorer(self)


class SqlScorer:
    """1 where the answer is one query that returns the gold query's rows, column by column; names do not count."""

    def __init__(self, spec: SqlSpec) -> None:
        self._spec, self._setup = spec, read_text(spec.setup) if spec.setup else ""
        meaning = (
            "The answer is one read-only query and returns the rows of the gold query, in its order where it "
            "says ORDER BY."
        )
        self.metrics = (Metric(spec.name, "share of answers", "higher", "binary", meaning),)

    def check(self, row: DatasetRow) -> None:
        gold = row.gold or {}
        for field in (self._spec.field, self._spec.setup_field):
            if field and not isinstance(gold.get(field), str):
                raise DataError(
                    f"row {row.id!r}: gold.{field}",
                    f"found {gold.get(field)!r}",
                    "the sql scorer takes its query and its tables from gold",
                    "add the field, or set the scorer's field and setup_field",
                )
        try:
            self._rows(gold, gold[self._spec.field])
        except sqlite3.Error as error:
            raise DataError(
                f"row {row.id!r}: gold.{self._spec.field}",
                f"it does not run ({error})",
                "the gold query is one that reads, within the scorer's bounds",
                "fix the row",
            ) from error

    def score(self, reply: ModelReply) -> dict[str, float]:
        gold = reply.gold or {}
        right = self._rows(gold, gold[self._spec.field])
        try:
            found = self._rows(gold, reply.text)
        except (sqlite3.Error, ValueError):  # ValueError: a NUL in the text
            return {self._spec.name: 0.0}
        return {
            self._spec.name: float(_equal_rows(found, right, ordered=bool(_ORDERED.search(gold[self._spec.field]))))
        }

    def _rows(self, gold: Any, query: str) -> Table:
        own = str(gold.get(self._spec.setup_field) or "") if self._spec.setup_field else ""
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES)
            connection.set_progress_handler(_QueryBudget(self._spec.max_steps), _STRIDE)
            connection.set_authorizer(_setup_only)
            connection.executescript(f"{self._setup}\n{own}")
            connection.set_progress_handler(_QueryBudget(self._spec.max_steps), _STRIDE)
            connection.set_authorizer(_reads_only)
            return self._fetch(connection, query)

    def _fetch(self, connection: sqlite3.Connection, query: str) -> Table:
        cursor = connection.execute(query)
        if cursor.description is None:
            raise sqlite3.ProgrammingError("it returns no table")
        rows: Table = cursor.fetchmany(self._spec.max_rows + 1)
        if len(rows) > self._spec.max_rows:
            raise sqlite3.DataError(f"more than {self._spec.max_rows} rows")
        return rows


class _QueryBudget:
    """Called every `_STRIDE` steps; a true value ends the query."""

    def __init__(self, steps: int) -> None:
        self._left, self._process = steps // _STRIDE, psutil.Process()
        self._most = self._process.memory_info().rss + _GROWTH_BYTES

    def __call__(self) -> int:
        self._left -= 1
        return self._left < 0 or self._process.memory_info().rss > self._most


def _reads_only(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


def _setup_only(action: int, *_: object) -> int:
    return sqlite3.SQLITE_DENY if action in _MAKES else sqlite3.SQLITE_OK


def _equal_rows(found: Table, right: Table, *, ordered: bool) -> bool:
    a, b = ([tuple(_plain(value) for value in row) for row in table] for table in (found, right))
    return a == b if ordered else Counter(a) == Counter(b)


def _plain(value: Any) -> Any:
    """Twelve digits of a float: sums in another order differ in the last ones."""
    return float(f"{value:.12g}") if isinstance(value, float) and math.isfinite(value) else value
