"""Shadow traffic: a bounded queue of request copies that the other arms answer in idle time.

Nothing here is on the response path: a request is copied after its caller has the answer, and what goes wrong with a
copy is a row in the log. Copies are sent while no caller's request is on its way, and our engine computes them only in
steps that have nothing else to do (`ArmRequest.background`), so that a caller who comes meanwhile does not wait.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from graftwork.serving.messages import ArmRequest


@dataclass(frozen=True, slots=True)
class Copy:
    """One request for one arm (`ArmRequest.shadow_copy`)."""

    request: ArmRequest
    request_id: str
    """Of the request that was copied."""
    unit: str


class ShadowQueue:
    """`answer` is called for each copy that comes to its turn; it must not raise."""

    def __init__(self, answer: Callable[[Copy], Awaitable[None]], *, limit: int, concurrency: int) -> None:
        self._answer, self._limit, self._concurrency = answer, limit, concurrency
        self._queue: deque[Copy] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._callers = 0
        self.dropped = 0
        """Copies that had to make room."""
        self.closed = False

    def offer(self, copy: Copy) -> None:
        """Queue a copy; where there is no room the oldest is dropped."""
        if self.closed:
            return
        if len(self._queue) >= self._limit:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(copy)
        self._serve()

    def caller_came(self) -> None:
        """A caller's request is on its way: no copy is sent until it has left."""
        self._callers += 1

    def caller_left(self) -> None:
        """It has its answer."""
        self._callers -= 1
        self._serve()

    @property
    def waiting(self) -> int:
        """Copies that are queued or being answered."""
        return len(self._queue) + len(self._running)

    async def close(self) -> None:
        """Drop what is queued, cancel what runs."""
        self.closed = True
        self.dropped += len(self._queue)
        self._queue.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _serve(self) -> None:
        while self._queue and self._callers == 0 and len(self._running) < self._concurrency:
            task = asyncio.get_running_loop().create_task(self._send_copy(self._queue.popleft()))
            self._running.add(task)

    async def _send_copy(self, copy: Copy) -> None:
        try:
            await self._answer(copy)
        finally:
            task = asyncio.current_task()
            assert task is not None, "it runs in a task"
            self._running.discard(task)
            if not self.closed:
                self._serve()
