"""Rows of one experiment on their way from the response path to scores, monitor and log, in batches and bounded.

The response path only appends to a queue. `step` does the rest, most of it in a thread. When the log can't be written
the rows wait and it is tried again. With `buffer` rows waiting or promised, a new request is refused by `admit`: it is
counted, named in the process' log, and takes no part. The answer of an admitted request is never dropped, since a
quicker arm would lose fewer of those.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence

from graftwork.errors import StorageError
from graftwork.serving.experiment.online.log_row import Assignment, LogRow
from graftwork.serving.experiment.online.segments import Segments, SegmentWriter

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
                log.warning("experiment %s: the log's buffer of %d rows is full, requests take no part from now on",
                            assignment.experiment, self._buffer)  # fmt: skip
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
                await _to_its_end(self._digested(queued))
            if self._unwritten and (last or time.monotonic() >= self._due or len(self._unwritten) >= MAX_BATCH):
                await _to_its_end(self._publish())

    async def _digested(self, queued: Sequence[LogRow | Assignment]) -> None:
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
            from graftwork.serving.experiment.online.log_reader import merged_parquet  # loads pyarrow

            self._writer.merge(merged_parquet)


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Await work in a thread, to its end where the caller is cancelled: no row is lost or written twice."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    finally:
        await task
