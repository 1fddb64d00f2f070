"""Log of an experiment on disk: segments of JSON lines that appear whole, never change, and have their number of rows
in their name. Many small ones are merged into one Parquet file.

`000002-00000017-53.jsonl`: the second writer's 17th segment, 53 rows. `000002-00000001-00000016-812.parquet` holds its
first sixteen; where both stand, the Parquet counts. A segment that does not hold the rows of its name is damaged: none
of its rows counts, and the others' all do. The order is that of the names, never of a clock.
"""

import asyncio
import io
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from graftwork.errors import ConfigError, GraftworkError, StorageError
from graftwork.scoring import AnswerSchema
from graftwork.serving.ab_test.spec import MEASURES, ExperimentSpec, OnlineRules
from graftwork.serving.evaluation.scorers.load import Scorers, load_scorers
from graftwork.serving.evaluation.scorers.protocol import ModelReply
from graftwork.storage.store import Store

# Rows: one `LogRow` for each assignment, answer, later score, and event.
#
# Rows are only ever appended. An assignment is written when a request is sent to its arm, before there is an answer:
# the order of these rows is the order in which units count (see `units`). An assignment or answer is known by
# (experiment, request id, arm), of several choices the first is meant: a row that stands twice counts once. A later
# score is a row of its own for each metric: it names the request id of its answer, with that answer's unit, arm, role
# and probability, and the metric as `detail`.


Role = Literal["primary", "shadow", "override", "holdout"]


class LogRow(BaseModel):
    """One line of the log; what does not belong to its kind is null. Times in ms, instants in Unix seconds (UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["assignment", "answer", "score", "event"]
    experiment: str
    """Name and digest of the experiment that the row belongs to."""
    at: float
    """When the row was written, by the clock of the ingress."""
    request_id: str = ""
    unit: str = ""
    """Keyed hash of the user, session or request: who it was is not in the log."""
    arm: str = ""
    role: Role = "primary"
    """primary: drawn, and seen by the caller; shadow: answered a copy; override and holdout: no part of the draw."""
    probability: float | None = Field(default=None, gt=0, le=1)
    """Chance that the unit had of this arm when it was assigned."""
    prompt_hash: str = ""
    base_digest: str | None = None
    adapter_version: str | None = None
    retrieved_ids: tuple[str, ...] = ()
    prompt: str | None = None
    """The conversation as JSON, where the experiment has `log_prompts`."""
    output: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    latency_ms: float | None = None
    cold: bool = False
    """The adapter had to be loaded first: its time says nothing of the arm."""
    scores: dict[str, float] = {}
    """By metric name. A failed answer has none: it counts as 0 on each."""
    event: str | None = None
    """start, resume, ramp, cut, kill, stop, stale. A `resume` with weights: the ingress was started again."""
    detail: str | None = None
    """Of an event its particulars as JSON; of a score the metric's name."""


class Assignment(NamedTuple):
    """The row of an assignment before it is a `LogRow`: made on the response path, where a draw takes 4 us in all."""

    experiment: str
    at: float
    request_id: str
    unit: str
    arm: str
    role: Role
    probability: float | None

    def row(self) -> LogRow:
        """Return it as a row."""
        return LogRow(kind="assignment", **self._asdict())


# Scorers and rules of a running experiment, built from its spec.


def scorers_of(spec: ExperimentSpec) -> Scorers:
    """Raises GraftworkError for a scorer that can't work on live traffic."""
    schema = AnswerSchema.load(spec.answer_schema) if spec.answer_schema else None
    return load_scorers(spec.scorers, schema, gold=False)


def score_answer(row: LogRow, scorers: Scorers) -> LogRow:
    """The answer with its scores; a failed one has none. Where a scorer fails the answer has none, and says so."""
    if row.kind != "answer" or row.error is not None or row.output is None:
        return row
    reply = ModelReply(
        row.output,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        ttft_ms=row.ttft_ms,
        latency_ms=row.latency_ms,
    )
    try:
        scores = {name: value for name, value in scorers.score(reply).items() if value == value}
    except GraftworkError as error:
        return row.model_copy(update={"detail": f"not scored: {error.subject}: {error.problem}"})
    return row.model_copy(update={"scores": scores})


def rules_of(spec: ExperimentSpec) -> OnlineRules:
    """The rules for the monitor. Raises ConfigError."""
    primary = spec.primary
    if primary.kind != "bounded" and primary.name not in (*MEASURES, *(one.name for one in scorers_of(spec).metrics)):
        raise ConfigError(
            f"primary.kind={primary.kind}",
            f"{primary.name} comes by feedback",
            "a unit without feedback counts with the middle of low..high",
            "set kind: bounded, low and high",
        )
    return OnlineRules(
        arms=tuple(arm.name for arm in spec.arms),
        control=spec.control,
        metric=primary.name,
        weights=spec.weights,
        kind=primary.kind,
        low=primary.low,
        high=primary.high,
        better=primary.better,
        alpha=spec.alpha,
        margin=spec.margin,
        mode=spec.mode,
        window_s=primary.window_s,
        deadline_s=primary.deadline_s,
        guardrails=spec.guardrails,
    )


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
        """Location of the segments."""
        return self.store.path(*self.folder)

    def listed(self) -> list[LogSegment]:
        """In order; those that a Parquet holds already are left out."""
        found = sorted(s for name in self.store.list(*self.folder) if (s := parse_name(name)) is not None)
        merged = [s for s in found if s.kind == "parquet"]
        return [s for s in found if s.kind == "parquet" or not any(_contains_segment(m, s) for m in merged)]

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


def _contains_segment(merged: LogSegment, one: LogSegment) -> bool:
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
                continue  # a damaged segment stays for inspection
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


# Writer: rows go from the response path to scorers, monitor and log in bounded batches.
#
# The response path only appends to a queue. `step` does the rest, most of it in a thread. When the log can't be written
# the rows wait and it is tried again. With `buffer` rows waiting or promised, a new request is refused by `admit`: it
# is counted, named in the process' log, and takes no part. The answer of an admitted request is never dropped, since a
# quicker arm would lose fewer of those.


log = logging.getLogger("ray.serve")
MAX_BATCH = 2_000
MERGE_EVERY = 64
"""Segments between two looks whether small ones can become a Parquet."""


class Recorder:
    """Made and used on the ingress' event loop. `digest` runs in a thread: it scores the rows and shows them to the
    monitor; what it returns is written."""

    def __init__(
        self,
        segments: Segments,
        digest: Callable[[Sequence[LogRow]], list[LogRow]],
        *,
        buffer: int,
        every_s: float,
    ) -> None:
        self._segments, self._digest = segments, digest
        self._buffer, self._every_s = buffer, every_s
        self._inbox: deque[LogRow | Assignment] = deque()
        self._unwritten: list[LogRow] = []
        self._writer: SegmentWriter | None = None
        self._due = time.monotonic() + every_s
        self._busy = asyncio.Lock()
        self._published = 0
        self._promised = 0
        self.dropped = 0
        """Requests that take no part because the buffer was full."""
        self.written = 0
        self.problem: str | None = None
        """Why the log can't be written now."""

    def admit(self, assignment: Assignment) -> bool:
        """Queue the assignment of a request and reserve room for its answer; False where there is none. Never waits."""
        if self.full:
            if self.dropped == 0:
                log.warning(
                    "experiment %s: the log's buffer of %d rows is full, requests take no part from now on",
                    assignment.experiment,
                    self._buffer,
                )
            self.dropped += 1
            return False
        self._promised += 1
        self._inbox.append(assignment)
        return True

    def add(self, row: LogRow) -> None:
        """Queue the answer of an admitted request, a score or an event; never waits."""
        self._promised -= row.kind == "answer"
        self._inbox.append(row)

    @property
    def full(self) -> bool:
        """Rows that wait, and answers that are promised, fill the buffer."""
        return self.waiting + self._promised >= self._buffer

    @property
    def waiting(self) -> int:
        """Rows that are not in the log yet."""
        return len(self._inbox) + len(self._unwritten)

    async def step(self, *, last: bool = False) -> None:
        """Digest what has come; publish it when it is time, or at once where it is the last step."""
        async with self._busy:
            while self._inbox:
                queued = [self._inbox.popleft() for _ in range(min(len(self._inbox), MAX_BATCH))]
                await _finish(self._digest_queued(queued))
            if self._unwritten and (last or time.monotonic() >= self._due or len(self._unwritten) >= MAX_BATCH):
                await _finish(self._publish())

    async def _digest_queued(self, queued: Sequence[LogRow | Assignment]) -> None:
        self._unwritten += await asyncio.to_thread(self._rows, queued)

    def _rows(self, queued: Sequence[LogRow | Assignment]) -> list[LogRow]:
        return self._digest([one.row() if isinstance(one, Assignment) else one for one in queued])

    async def _publish(self) -> None:
        rows = self._unwritten
        try:
            await asyncio.to_thread(self._write, rows)
        except StorageError as error:
            if self.problem is None:
                log.warning("experiment %s: %s", rows[0].experiment, error)
            self.problem = str(error.problem)
        else:
            self._unwritten, self.problem = [], None
            self.written += len(rows)
        self._due = time.monotonic() + self._every_s

    def _write(self, rows: Sequence[LogRow]) -> None:
        if self._writer is None:
            self._writer = SegmentWriter(self._segments)
        self._writer.publish(rows)
        self._published += 1
        if self._published % MERGE_EVERY == 1:
            from graftwork.serving.ab_test.log_reader import merged_parquet  # loads pyarrow

            self._writer.merge(merged_parquet)


async def _finish(work: Coroutine[None, None, None]) -> None:
    """Await work in a thread, to its end where the caller is cancelled: no row is lost or written twice."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    finally:
        await task
