"""Requests of one call in the engine, as the event loop sees them: events in, growing answers and likelihoods out."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from graftwork.prompts.render import cited_passage_ids
from graftwork.prompts.template import Template
from graftwork.serving.api.errors import ApiError, bad_request
from graftwork.serving.arms import ArmPrompt
from graftwork.serving.detokenize import LogprobStream, TextStream, TokenLogprob
from graftwork.serving.engine import Engine
from graftwork.serving.engine.request import GenerateRequest, TokenEvent
from graftwork.serving.messages import AnswerDelta, ArmAnswer, ArmRequest, Likelihood, StreamStart


class Generation:
    """The submitted requests of one call: one, or one for each of its answers, in order.

    `on_end` is called once: on the event loop when the engine has released all requests, or at once where
    `Engine.submit` refuses one. Raises what `submit` raises; then nothing stays queued.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerateRequest], on_end: Callable[[], None]) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._on_end: Callable[[], None] | None = on_end
        self._index = {request.request_id: index for index, request in enumerate(requests)}
        self._running: set[str] = set()
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        try:
            for request in requests:
                engine.submit(request, self._post)
                self._running.add(request.request_id)
        except BaseException:
            self._on_end = None
            self.close()
            on_end()
            raise

    async def events(self) -> AsyncIterator[dict[int, list[TokenEvent]]]:
        """Yield what arrived since the last call, by answer; ends with the last event of the last answer."""
        left = len(self._index)
        while left:
            ready = [await self._events.get()]
            while not self._events.empty():
                ready.append(self._events.get_nowait())
            by_answer: dict[int, list[TokenEvent]] = {}
            for event in ready:
                by_answer.setdefault(self._index[event.request_id], []).append(event)
                left -= event.finish_reason is not None
            yield by_answer

    def close(self) -> None:
        """End in the engine what still runs."""
        for request_id in self._running:
            self._engine.cancel(request_id)

    def _post(self, event: TokenEvent) -> None:
        """Called by the engine's thread for each event."""
        if not self._loop.is_closed():  # closed: the replica is going down and nobody reads any more
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: TokenEvent) -> None:
        self._events.put_nowait(event)
        if event.finish_reason is not None:
            self._running.discard(event.request_id)
            if not self._running and self._on_end is not None:
                self._on_end()


def require_served(event: TokenEvent) -> None:
    """Raises ApiError for an event that ends its request without what was asked for."""
    if event.finish_reason == "error":
        raise ApiError(500, f"The engine failed on this request: {event.error}", code="engine_error")
    if event.finish_reason == "cancelled":
        raise ApiError(503, "The request was cancelled because the engine is going down.", code="engine_stopping")


class StreamedAnswer:
    """Tokens become an `ArmAnswer`. `arrived` is the `time.perf_counter` of the call.

    stop_ids: tokens that end the answer and are no part of its text. logprobs: collects them where they are asked for.
    """

    def __init__(
        self,
        index: int,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        stop_ids: frozenset[int],
        prompt: ArmPrompt,
        arrived: float,
        logprobs: LogprobStream | None = None,
    ) -> None:
        self.index, self._text, self._stop_ids = index, TextStream(decode, stop), stop_ids
        self._prompt, self._arrived = prompt, arrived
        self._logprobs = logprobs
        self._ttft_ms: float | None = None
        self._cached_tokens = 0
        self.token_ids: list[int] = []
        self.finish_reason = ""
        """Set by the answer's last event."""

    def add(self, events: Sequence[TokenEvent]) -> AnswerDelta:
        """Return the text that is certain now, with its log probabilities. Raises ApiError where the engine failed."""
        if self._ttft_ms is None:
            self._ttft_ms, self._cached_tokens = (time.perf_counter() - self._arrived) * 1000, events[0].cached_tokens
        text = ""
        for event in events:
            require_served(event)
            self.finish_reason = event.finish_reason or ""
            if event.token_id < 0:
                continue
            self.token_ids.append(event.token_id)
            if event.token_id not in self._stop_ids:
                if self._logprobs is not None:
                    self._logprobs.push(event)
                text += self._text.push(event.token_id)
        if self.finish_reason:
            text += self._text.finish()
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._logprobs is not None:
            whole = bool(self.finish_reason) and not self._text.stopped
            logprobs = tuple(self._logprobs.take(len(self._text.text), whole=whole))
        return AnswerDelta(self.index, text, len(self.token_ids), logprobs)

    def answer(self, request: ArmRequest, task: str | None, start: StreamStart, *, cold: bool) -> ArmAnswer:
        """Return the whole answer, once the last event was added."""
        prompt, text = self._prompt, self._text.text
        return ArmAnswer(
            request_id=request.request_id,
            arm=request.arm.name,
            text=text,
            adapter=task,
            adapter_version=start.adapter_version,
            base_digest=start.base_digest,
            retrieved_ids=prompt.retrieved_ids,
            prompt_tokens=start.prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=len(self.token_ids),
            ttft_ms=self._ttft_ms or 0.0,
            latency_ms=(time.perf_counter() - self._arrived) * 1000,
            finish_reason=self.finish_reason,
            token_ids=tuple(self.token_ids),
            index=self.index,
            logprobs=tuple(self._logprobs.released) if self._logprobs is not None else None,
            left_out_ids=prompt.left_out_ids,
            cited_ids=cited_passage_ids(text, prompt.retrieved_ids) if prompt.citations else (),
            cold=cold,
        )


def continuation_ids(texts: Sequence[str], template: Template) -> list[tuple[int, ...]]:
    """Return the ids of each text as it stands right behind a prompt, without special tokens. Raises ApiError."""
    if not texts:
        raise bad_request("continuations is empty: there is nothing to be scored.", param="continuations")
    for number, text in enumerate(texts):
        if not text:
            raise bad_request(f"continuation {number} is empty: it has no token.", param="continuations")
    return [tuple(template.continuation_ids(text)) for text in texts]


async def collect_likelihoods(generation: Generation, lengths: Sequence[int]) -> list[Likelihood]:
    """Wait for the likelihood of each continuation, in order. Raises ApiError where the engine failed.

    lengths: tokens of each continuation.
    """
    found: dict[int, Likelihood] = {}
    async for events in generation.events():
        for index, [event] in events.items():
            require_served(event)
            assert event.logprob is not None, "the event of a scored request has the sum"
            found[index] = Likelihood(event.logprob, lengths[index])
    return [found[index] for index in range(len(lengths))]
