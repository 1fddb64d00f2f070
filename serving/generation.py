"""One request in the engine, seen from the event loop: events cross from the engine's thread, the answer grows here."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from graftwork.serving.api_error import ApiError
from graftwork.serving.arms import ArmAnswer, ArmPrompt
from graftwork.serving.engine.types import GenerateRequest, TokenEvent
from graftwork.serving.engine_protocol import EngineLike
from graftwork.serving.text_stream import TextStream


class Generation:
    """A submitted request. `on_end` is called once on the event loop, when the engine has let go of the request.

    Raises what `EngineLike.submit` raises; then nothing was queued and `on_end` is never called.
    """

    def __init__(self, engine: EngineLike, request: GenerateRequest, on_end: Callable[[], None]) -> None:
        self._engine, self._request_id, self._on_end = engine, request.request_id, on_end
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._ended = False
        loop = asyncio.get_running_loop()
        engine.submit(request, lambda event: _hand_over(loop, self._arrive, event))

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """What arrived since the last look, at least one event; the last list ends with the last event."""
        ended = False
        while not ended:
            ready = [await self._events.get()]
            while not self._events.empty():
                ready.append(self._events.get_nowait())
            ended = ready[-1].finish_reason is not None
            yield ready

    def close(self) -> None:
        """End the request in the engine if it still runs."""
        if not self._ended:
            self._engine.cancel(self._request_id)

    def _arrive(self, event: TokenEvent) -> None:
        self._events.put_nowait(event)
        if event.finish_reason is not None:
            self._ended = True
            self._on_end()


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[[TokenEvent], None], event: TokenEvent) -> None:
    if not loop.is_closed():  # closed: the replica is going down and nobody reads any more
        loop.call_soon_threadsafe(call, event)


class GrowingAnswer:
    """Tokens become an `ArmAnswer`. `arrived` is the `time.perf_counter` of the call."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], prompt: ArmPrompt, arrived: float
    ) -> None:
        self._text, self._prompt, self._arrived = TextStream(decode, stop), prompt, arrived
        self._ids: list[int] = []
        self._ttft_ms: float | None = None
        self._cached_tokens = 0
        self._finish_reason = ""

    def push(self, events: Sequence[TokenEvent]) -> str:
        """The new certain text. Raises ApiError where the engine failed or dropped the request."""
        if self._ttft_ms is None:
            self._ttft_ms, self._cached_tokens = self._elapsed_ms(), events[0].cached_tokens
        text = "".join(self._push_one(event) for event in events)
        return text + (self._text.finish() if self._finish_reason else "")

    def answer(self, request_id: str, arm: str, task: str | None, version: str | None, base_digest: str) -> ArmAnswer:
        """The whole answer, once the last event was pushed."""
        return ArmAnswer(
            request_id=request_id, arm=arm, text=self._text.text, adapter=task, adapter_version=version,
            base_digest=base_digest, retrieved_ids=self._prompt.retrieved_ids, prompt_tokens=len(self._prompt.ids),
            cached_tokens=self._cached_tokens, completion_tokens=len(self._ids), ttft_ms=self._ttft_ms or 0.0,
            latency_ms=self._elapsed_ms(), finish_reason=self._finish_reason, token_ids=tuple(self._ids),
        )  # fmt: skip

    def _push_one(self, event: TokenEvent) -> str:
        if event.finish_reason == "error":
            raise ApiError(500, f"The engine failed on this request: {event.error}", code="engine_error")
        if event.finish_reason == "cancelled":
            raise ApiError(503, "The request was cancelled because the engine is going down.", code="engine_stopping")
        self._finish_reason = event.finish_reason or ""
        if event.token_id < 0:
            return ""
        self._ids.append(event.token_id)
        return "" if event.token_id in self._prompt.stop_ids else self._text.push(event.token_id)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._arrived) * 1000
