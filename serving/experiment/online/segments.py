"""The log of an experiment on disk: segments that appear whole, never change, and say in their name how many rows they
hold. JSON lines as they are written; many small ones become one Parquet.

`000002-00000017-53.jsonl`: the second writer's 17th segment, 53 rows. `000002-00000001-00000016-812.parquet` holds its
first sixteen; where both stand, the Parquet counts. A segment that does not hold the rows of its name is damaged: none
of its rows counts, and the others' all do. The order is that of the names, never of a clock.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.serving.experiment.online.log_row import LogRow
from graftwork.storage import Store

_NAME = re.compile(r"^(\d{6})-(\d{8})(?:-(\d{8}))?-(\d+)\.(jsonl|parquet)$")


@dataclass(frozen=True, order=True)
class LogSegment:
    """One file of the log."""

    writer: int
    first: int
    last: int
    rows: int
    kind: str

    @property
    def name(self) -> str:
        """Its file name."""
        span = f"{self.first:08d}" if self.kind == "jsonl" else f"{self.first:08d}-{self.last:08d}"
        return f"{self.writer:06d}-{span}-{self.rows}.{self.kind}"


def parse_name(name: str) -> LogSegment | None:
    """None where the file is no segment."""
    match = _NAME.match(name)
    if match is None or (match[3] is None) != (match[5] == "jsonl"):
        return None
    return LogSegment(int(match[1]), int(match[2]), int(match[3] or match[2]), int(match[4]), match[5])


class Segments:
    """The segments in one folder of a store."""

    def __init__(self, store: Store, folder: Sequence[str]) -> None:
        self.store, self.folder = store, tuple(folder)

    @property
    def uri(self) -> str:
        """Where they lie."""
        return self.store.path(*self.folder)

    def listed(self) -> list[LogSegment]:
        """In order; those that a Parquet holds already are left out."""
        found = sorted(s for name in self.store.list(*self.folder) if (s := parse_name(name)) is not None)
        merged = [s for s in found if s.kind == "parquet"]
        return [s for s in found if s.kind == "parquet" or not any(_holds(m, s) for m in merged)]

    def leftovers(self) -> list[LogSegment]:
        """Those that a Parquet holds and that were not removed yet."""
        kept = set(self.listed())
        found = [s for name in self.store.list(*self.folder) if (s := parse_name(name)) is not None]
        return [s for s in found if s not in kept]

    def read(self, segment: LogSegment) -> bytes:
        """Its bytes."""
        return self.store.read_bytes(*self.folder, segment.name)

    def create(self, segment: LogSegment, data: bytes) -> bool:
        """Publish it whole. False where another writer has that name."""
        return self.store.create_bytes(data, *self.folder, segment.name)

    def remove(self, segment: LogSegment) -> None:
        """Delete one."""
        self.store.delete(*self.folder, segment.name)


def _holds(merged: LogSegment, one: LogSegment) -> bool:
    return merged.writer == one.writer and merged.first <= one.first and one.last <= merged.last


def encode(rows: Sequence[LogRow]) -> bytes:
    """JSON lines; what has its default is left out."""
    return b"".join(row.model_dump_json(exclude_defaults=True).encode() + b"\n" for row in rows)


Merged = Callable[[Segments, Sequence[LogSegment]], tuple[bytes, int] | None]
"""`log_reader.merged_parquet`: the rows of segments as one Parquet, and their number."""


class SegmentWriter:
    """Numbers the segments of one process and merges them. All methods block."""

    def __init__(self, segments: Segments, merge_at: int = 64) -> None:
        self._segments, self._merge_at = segments, merge_at
        self._writer = 1 + max((s.writer for s in segments.listed()), default=0)
        self._number = 0

    def publish(self, rows: Sequence[LogRow]) -> None:
        """One segment with these rows. Raises StorageError; then none of them is in the log."""
        data = encode(rows)
        while True:
            self._number += 1
            if self._segments.create(LogSegment(self._writer, self._number, self._number, len(rows), "jsonl"), data):
                return

    def merge(self, merged: Merged) -> None:
        """Turn the JSON lines of each writer into one Parquet, once there are many."""
        for one in self._segments.leftovers():
            self._segments.remove(one)
        small = [s for s in self._segments.listed() if s.kind == "jsonl"]
        for run in _runs(small):
            if len(run) < self._merge_at and run[0].writer == self._writer:
                continue
            whole = merged(self._segments, run)
            if whole is None or len(run) < 2:
                continue  # a damaged one stays as it is, for whoever looks into it
            self._segments.create(LogSegment(run[0].writer, run[0].first, run[-1].last, whole[1], "parquet"), whole[0])
            for one in run:
                self._segments.remove(one)


def _runs(small: Sequence[LogSegment]) -> Iterator[list[LogSegment]]:
    """Segments of one writer without a gap in their numbers."""
    run: list[LogSegment] = []
    for one in small:
        if run and (run[-1].writer, run[-1].last + 1) != (one.writer, one.first):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def parquet_bytes(table: Any) -> bytes:
    """A pyarrow table as Parquet."""
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()
