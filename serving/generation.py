"""A call's requests in the engine, seen from the event loop: events cross from its thread, the answers grow here."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass

from graftwork.errors import GraftworkError
from graftwork.prompts.render import cited_passage_ids
from graftwork.prompts.template import Template
from graftwork.serving.api.errors import ApiError, bad_request
from graftwork.serving.arms import ArmAnswer, ArmPrompt, Dump
from graftwork.serving.detokenize import LogprobStream, TextStream, TokenLogprob
from graftwork.serving.engine import Engine
from graftwork.serving.engine.request import GenerateRequest, TokenEvent


class Generation:
    """The submitted requests of one call: one, or one for each of its answers, in order.

    `on_end` is called once on the event loop, when the engine has let go of them all. Raises what `Engine.submit`
    raises; then nothing stays queued and `on_end` is never called.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerateRequest], on_end: Callable[[], None]) -> None:
        self._engine, self._on_end = engine, on_end
        self._index = {request.request_id: index for index, request in enumerate(requests)}
        self._running: set[str] = set()
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            for request in requests:
                engine.submit(request, lambda event: _post_to_loop(loop, self._on_event, event))
                self._running.add(request.request_id)
        except GraftworkError:
            self._on_end = _nothing
            self.close()
            raise

    async def events(self) -> AsyncIterator[dict[int, list[TokenEvent]]]:
        """What arrived since the last look, by answer; ends with the last event of the last answer."""
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

    def _on_event(self, event: TokenEvent) -> None:
        self._events.put_nowait(event)
        if event.finish_reason is not None:
            self._running.discard(event.request_id)
            if not self._running:
                self._on_end()


def require_served(event: TokenEvent) -> None:
    """Raises ApiError for an event that ends its request without what was asked for."""
    if event.finish_reason == "error":
        raise ApiError(500, f"The engine failed on this request: {event.error}", code="engine_error")
    if event.finish_reason == "cancelled":
        raise ApiError(503, "The request was cancelled because the engine is going down.", code="engine_stopping")


def _nothing() -> None:
    pass


def _post_to_loop(loop: asyncio.AbstractEventLoop, call: Callable[[TokenEvent], None], event: TokenEvent) -> None:
    if not loop.is_closed():  # closed: the replica is going down and nobody reads any more
        loop.call_soon_threadsafe(call, event)


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
        self._ids: list[int] = []
        self._ttft_ms: float | None = None
        self._cached_tokens = 0
        self._finish_reason = ""

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""
        return len(self._ids)

    @property
    def ended(self) -> bool:
        """The last event was pushed."""
        return bool(self._finish_reason)

    def add(self, events: Sequence[TokenEvent]) -> tuple[str, list[TokenLogprob]]:
        """The new certain text, and its tokens' log probabilities. Raises ApiError where the engine failed."""
        if self._ttft_ms is None:
            self._ttft_ms, self._cached_tokens = self._elapsed_ms(), events[0].cached_tokens
        text = "".join(self._push_one(event) for event in events)
        text += self._text.finish() if self.ended else ""
        if self._logprobs is None:
            return text, []
        return text, self._logprobs.take(len(self._text.text), whole=self.ended and not self._text.stopped)

    def answer(
        self, request_id: str, arm: str, task: str | None, version: str | None, base_digest: str, *, cold: bool = False
    ) -> ArmAnswer:
        """The whole answer, once the last event was pushed."""
        return ArmAnswer(
            request_id=request_id,
            arm=arm,
            text=self._text.text,
            adapter=task,
            adapter_version=version,
            base_digest=base_digest,
            retrieved_ids=self._prompt.retrieved_ids,
            prompt_tokens=len(self._prompt.ids),
            cached_tokens=self._cached_tokens,
            completion_tokens=len(self._ids),
            ttft_ms=self._ttft_ms or 0.0,
            latency_ms=self._elapsed_ms(),
            finish_reason=self._finish_reason,
            token_ids=tuple(self._ids),
            index=self.index,
            logprobs=tuple(self._logprobs.told) if self._logprobs is not None else None,
            left_out_ids=self._prompt.left_out_ids,
            cited_ids=self._cited(),
            cold=cold,
        )

    def _push_one(self, event: TokenEvent) -> str:
        require_served(event)
        self._finish_reason = event.finish_reason or ""
        if event.token_id < 0:
            return ""
        self._ids.append(event.token_id)
        if event.token_id in self._stop_ids:
            return ""
        if self._logprobs is not None:
            self._logprobs.push(event)
        return self._text.push(event.token_id)

    def _cited(self) -> tuple[str, ...]:
        return cited_passage_ids(self._text.text, self._prompt.retrieved_ids) if self._prompt.citations else ()

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._arrived) * 1000


# How likely given answers are, for one arm and conversation: the call's requests in the engine and what they tell.


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one continuation."""

    logprob: float
    """Natural log of its probability: the sum over its tokens, each given the prompt and the tokens before it."""
    tokens: int

    def dump(self) -> Dump:
        """As a plain dict, the form that travels through a handle."""
        return asdict(self)


def continuation_ids(texts: Sequence[str], template: Template) -> list[tuple[int, ...]]:
    """Ids of each text as it stands right behind a prompt; no special token can come out. Raises ApiError."""
    if not texts:
        raise bad_request("continuations is empty: there is nothing to be scored.", param="continuations")
    for number, text in enumerate(texts):
        if not text:
            raise bad_request(f"continuation {number} is empty: it has no token.", param="continuations")
    return [tuple(template.continuation_ids(text)) for text in texts]


async def collect(generation: Generation, lengths: Sequence[int]) -> list[Likelihood]:
    """Waits for all scores, in order. lengths: tokens of each continuation. Raises ApiError where the engine failed."""
    told: dict[int, Likelihood] = {}
    async for events in generation.events():
        for index, [event] in events.items():
            require_served(event)
            assert event.logprob is not None, "a scored request tells its sum"
            told[index] = Likelihood(event.logprob, lengths[index])
    return [told[index] for index in range(len(lengths))]
