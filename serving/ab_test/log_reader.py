"""Reader of the experiment log: column batches in the order of writing, duplicates removed, damage reported.

One segment is in memory at a time, and a key of some bytes for each row seen.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json
from pyarrow import parquet

from graftwork.errors import StorageError
from graftwork.serving.ab_test.log import LogRow, LogSegment, Segments, parquet_bytes
from graftwork.serving.ab_test.spec import MEASURES, OnlineRules
from graftwork.stats import Floats
from graftwork.storage.store import Store

# Columns of the rows that the monitor reads, from `LogRow`s and from Arrow batches.
#
# No object is made for a row of a batch: a million rows take a second.


@dataclass(frozen=True)
class LogColumns:
    """As many entries in each as there are rows. A number that is missing is NaN."""

    kind: Sequence[str]
    role: Sequence[str]
    arm: Sequence[str]
    unit: Sequence[str]
    request_id: Sequence[str]
    at: Sequence[float]
    probability: Sequence[float]
    failed: Sequence[bool]
    cold: Sequence[bool]
    empty: Sequence[bool]
    """No passage was retrieved."""
    event: Sequence[str | None]
    detail: Sequence[str | None]
    numbers: dict[str, Floats]
    """Each of `numbers_of(rules)`."""

    def __len__(self) -> int:
        return len(self.kind)


def numbers_of(rules: OnlineRules) -> tuple[str, ...]:
    """Measures and scores that the rules need."""
    names = [rules.metric]
    for guard in rules.guardrails:
        if guard.kind == "latency":
            names.append("latency_ms")
        elif guard.kind in ("schema_invalid", "fairness_gap"):
            names += [guard.score, *(guard.groups or ())]
    return tuple(dict.fromkeys(names))


def columns_of_rows(rows: Sequence[LogRow], names: Sequence[str]) -> LogColumns:
    """From rows as they are written."""
    return LogColumns(
        kind=[row.kind for row in rows],
        role=[row.role for row in rows],
        arm=[row.arm for row in rows],
        unit=[row.unit for row in rows],
        request_id=[row.request_id for row in rows],
        at=[row.at for row in rows],
        probability=[np.nan if row.probability is None else row.probability for row in rows],
        failed=[row.error is not None for row in rows],
        cold=[row.cold for row in rows],
        empty=[not row.retrieved_ids for row in rows],
        event=[row.event for row in rows],
        detail=[row.detail for row in rows],
        numbers={name: np.array([_number(row, name) for row in rows], dtype=np.float64) for name in names},
    )


def columns_of_batch(batch: Any, names: Sequence[str]) -> LogColumns:
    """From a pyarrow RecordBatch with the fields of `LogRow`; `scores` is a struct of numbers, or is not there."""
    import pyarrow.compute as pc

    def listed(name: str) -> Any:
        return batch.column(name).to_pylist()

    retrieved = pc.fill_null(pc.list_value_length(batch.column("retrieved_ids")), 0)
    return LogColumns(
        kind=listed("kind"),
        role=listed("role"),
        arm=listed("arm"),
        unit=listed("unit"),
        request_id=listed("request_id"),
        at=listed("at"),
        probability=_floats(batch.column("probability")).tolist(),
        failed=batch.column("error").is_valid().to_pylist(),
        cold=listed("cold"),
        empty=pc.equal(retrieved, 0).to_pylist(),
        event=listed("event"),
        detail=listed("detail"),
        numbers={name: _batch_number(batch, name) for name in names},
    )


def _number(row: LogRow, name: str) -> float:
    value = getattr(row, name) if name in MEASURES else row.scores.get(name)
    return np.nan if value is None else float(value)


def _batch_number(batch: Any, name: str) -> Floats:
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in MEASURES:
        return _floats(batch.column(name))
    if "scores" not in batch.schema.names:
        return np.full(len(batch), np.nan)
    scores = batch.column("scores")
    found = [field.name for field in scores.type]
    return _floats(pc.struct_field(scores, found.index(name)) if name in found else pa.nulls(len(batch), pa.float64()))


def _floats(column: Any) -> Floats:
    import pyarrow.compute as pc

    values: Floats = pc.cast(column, "float64").to_numpy(zero_copy_only=False)
    return values


SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("experiment", pa.string()),
        ("at", pa.float64()),
        ("request_id", pa.string()),
        ("unit", pa.string()),
        ("arm", pa.string()),
        ("role", pa.string()),
        ("probability", pa.float64()),
        ("prompt_hash", pa.string()),
        ("base_digest", pa.string()),
        ("adapter_version", pa.string()),
        ("retrieved_ids", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("output", pa.string()),
        ("error", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("ttft_ms", pa.float64()),
        ("latency_ms", pa.float64()),
        ("cold", pa.bool_()),
        ("event", pa.string()),
        ("detail", pa.string()),
    ]
)
"""The fields of LogRow but `scores`, which is a struct with a float64 for each metric that the segment has."""
_FILLED: dict[str, Any] = {"request_id": "", "unit": "", "arm": "", "role": "primary", "prompt_hash": "", "cold": False}


@dataclass
class LogHealth:
    """Counts of damage and duplicates; complete after the last batch."""

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
                yield from self._drop_duplicates(table).to_batches()

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

    def _drop_duplicates(self, table: pa.Table) -> pa.Table:
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
        return _with_all_columns(parquet.read_table(io.BytesIO(data)))
    if not data.endswith(b"\n"):
        raise ValueError("its last line is cut")
    options = arrow_json.ParseOptions(explicit_schema=SCHEMA)
    reading = arrow_json.ReadOptions(block_size=max(1 << 20, len(data) + 1))  # one block: a line is never split
    return _with_all_columns(arrow_json.read_json(io.BytesIO(data), read_options=reading, parse_options=options))


def _with_all_columns(table: pa.Table) -> pa.Table:
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
        raise StorageError(
            f"experiment log {log.segments.uri}",
            "there is no segment in it",
            "",
            "check the address; rows are written about a second after the answer",
        )
    return log


def _keys(table: pa.Table) -> list[str]:
    """Identity of a row: answers by request and arm, scores by their metric (in `detail`) too, events by all."""
    said = pc.binary_join_element_wise(pc.fill_null(table["event"], ""), pc.fill_null(table["detail"], ""), "|")
    stamped = pc.binary_join_element_wise(said, pc.cast(table["at"], pa.string()), "|")
    tail = pc.if_else(pc.equal(table["kind"], "event"), stamped, said)
    whole = pc.binary_join_element_wise(
        table["kind"], table["experiment"], table["request_id"], table["arm"], tail, "\x1f"
    )
    found: list[str] = whole.to_pylist()
    return found
