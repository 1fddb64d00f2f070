"""The log of an experiment as column batches: damaged segments told, duplicate rows once, in the order of writing.

One segment is in memory at a time, and a key of some bytes for each row seen.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json
from pyarrow import parquet

from graftwork.errors import StorageError
from graftwork.serving.experiment.online.log_row import LogRow
from graftwork.serving.experiment.online.segments import LogSegment, Segments, parquet_bytes
from graftwork.storage import Store

SCHEMA = pa.schema([
    ("kind", pa.string()), ("experiment", pa.string()), ("at", pa.float64()), ("request_id", pa.string()),
    ("unit", pa.string()), ("arm", pa.string()), ("role", pa.string()), ("probability", pa.float64()),
    ("prompt_hash", pa.string()), ("base_digest", pa.string()), ("adapter_version", pa.string()),
    ("retrieved_ids", pa.list_(pa.string())), ("output", pa.string()), ("error", pa.string()),
    ("finish_reason", pa.string()), ("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64()),
    ("ttft_ms", pa.float64()), ("latency_ms", pa.float64()), ("cold", pa.bool_()),
    ("event", pa.string()), ("detail", pa.string()),
])  # fmt: skip
"""The fields of LogRow but `scores`, which is a struct with a float64 for each metric that the segment has."""
_FILLED: dict[str, Any] = {"request_id": "", "unit": "", "arm": "", "role": "primary", "prompt_hash": "", "cold": False}


@dataclass
class LogHealth:
    """What was found while the log was read; whole once the last batch came."""

    segments: int = 0
    rows: int = 0
    """That count."""
    duplicates: int = 0
    damaged: list[str] = field(default_factory=list)
    """Names of the segments of which no row counts, each with the reason."""


class ExperimentLog:
    """The log in one folder. Iterate over `batches` once; then `health` is whole."""

    def __init__(self, store: Store, folder: Sequence[str]) -> None:
        self.segments = Segments(store, folder)
        self.health = LogHealth()
        self._seen: set[str] = set()

    @classmethod
    def at(cls, uri: str) -> "ExperimentLog":
        """The log at a folder, file:// or s3:// address."""
        return cls(Store(uri), ())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """A batch a segment, in the order of writing: SCHEMA, and `scores` where any row has some.

        A duplicate of an answer (experiment, request, arm) or of a score is left out.
        """
        done: set[LogSegment] = set()
        while rest := [segment for segment in self.segments.listed() if segment not in done]:
            for segment in rest:
                done.add(segment)
                table = self._table(segment)
                if table is None:
                    break  # merged into a Parquet since it was listed: look again
                yield from self._fresh(table).to_batches()

    def rows(self) -> Iterator[LogRow]:
        """As `batches`, row by row."""
        for batch in self.batches():
            for tree in batch.to_pylist():
                yield row_of(tree)

    def _table(self, segment: LogSegment) -> pa.Table | None:
        """None: it is gone. An empty table: it is damaged."""
        data = self.segments.store.find_bytes(*self.segments.folder, segment.name)
        if data is None:
            return None
        self.health.segments += 1
        table, problem = decode(segment, data)
        if problem:
            self.health.damaged.append(f"{segment.name}: {problem}")
        return table

    def _fresh(self, table: pa.Table) -> pa.Table:
        keys = _keys(table)
        keep: list[bool] = []
        for key in keys:
            keep.append(key not in self._seen)
            self._seen.add(key)
        kept = table.filter(pa.array(keep, pa.bool_())) if not all(keep) else table
        self.health.rows += len(kept)
        self.health.duplicates += len(table) - len(kept)
        return kept


def decode(segment: LogSegment, data: bytes) -> tuple[pa.Table, str]:
    """The segment's rows, and what is wrong with it ("": nothing). A damaged one gives no rows."""
    try:
        table = _parse(segment, data)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        return SCHEMA.empty_table(), f"cannot be read ({str(error).splitlines()[0][:120]})"
    if len(table) != segment.rows:
        return SCHEMA.empty_table(), f"{len(table)} rows, its name says {segment.rows}"
    return table, ""


def _parse(segment: LogSegment, data: bytes) -> pa.Table:
    if segment.kind == "parquet":
        return _whole(parquet.read_table(io.BytesIO(data)))
    if not data.endswith(b"\n"):
        raise ValueError("its last line is cut")
    options = arrow_json.ParseOptions(explicit_schema=SCHEMA)
    reading = arrow_json.ReadOptions(block_size=max(1 << 20, len(data) + 1))  # one block: a line is never split
    return _whole(arrow_json.read_json(io.BytesIO(data), read_options=reading, parse_options=options))


def _whole(table: pa.Table) -> pa.Table:
    """Every column of SCHEMA, with the defaults that were left out, and the scores as float64."""
    missing = sorted({"kind", "experiment", "at"} - set(table.column_names))
    if missing:
        raise ValueError(f"it has no column {missing[0]!r}")
    columns = {name: _column(table, name) for name in SCHEMA.names}
    for name, default in _FILLED.items():
        columns[name] = columns[name].fill_null(default)
    if "scores" in table.column_names and table["scores"].type != pa.null():
        names = [one.name for one in table["scores"].type]
        if names:
            columns["scores"] = table["scores"].cast(pa.struct([(name, pa.float64()) for name in names]))
    return pa.table(columns)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    kind = SCHEMA.field(name).type
    if name in table.column_names:
        return table[name].cast(kind)
    return pa.chunked_array([pa.nulls(len(table), kind)])


def scores_of(batch: pa.RecordBatch, metric: str) -> pa.Array:
    """The column of one metric, null where a row has none."""
    if "scores" not in batch.schema.names:
        return pa.nulls(len(batch), pa.float64())
    scores = batch.column("scores")
    names = [one.name for one in scores.type]
    return pc.struct_field(scores, names.index(metric)) if metric in names else pa.nulls(len(batch), pa.float64())


def row_of(tree: dict[str, Any]) -> LogRow:
    """A row of a batch."""
    scores = {name: value for name, value in (tree.get("scores") or {}).items() if value is not None}
    return LogRow.model_validate({**tree, "scores": scores, "retrieved_ids": tuple(tree["retrieved_ids"] or ())})


def merged_parquet(segments: Segments, run: Sequence[LogSegment]) -> tuple[bytes, int] | None:
    """The segments' rows as one Parquet, and how many; None where one of them is damaged."""
    tables = []
    for one in run:
        table, problem = decode(one, segments.read(one))
        if problem:
            return None
        tables.append(table)
    whole = pa.concat_tables(tables, promote_options="permissive")
    return parquet_bytes(whole), len(whole)


def read_log(store: Store, folder: Sequence[str]) -> ExperimentLog:
    """The log in a folder. Raises StorageError where there is none."""
    log = ExperimentLog(store, folder)
    if not log.segments.listed():
        raise StorageError(f"experiment log {log.segments.uri}", "there is no segment in it", "",
                           "check the address; rows are written about a second after the answer")  # fmt: skip
    return log


def _keys(table: pa.Table) -> list[str]:
    """What a row is known by: answers by request and arm, scores by their metric (in `detail`) too, events by all."""
    said = pc.binary_join_element_wise(pc.fill_null(table["event"], ""), pc.fill_null(table["detail"], ""), "|")
    stamped = pc.binary_join_element_wise(said, pc.cast(table["at"], pa.string()), "|")
    tail = pc.if_else(pc.equal(table["kind"], "event"), stamped, said)
    whole = pc.binary_join_element_wise(
        table["kind"], table["experiment"], table["request_id"], table["arm"], tail, "\x1f"
    )
    found: list[str] = whole.to_pylist()
    return found
