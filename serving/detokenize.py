"""Events of the engine become answers: tokens are detokenized while they arrive.

No half characters and nothing of a stop string get out. Log probabilities are released together with the text that
their tokens belong to.
"""

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, Callable, Container, Sequence
from dataclasses import dataclass, field

from graftwork.prompts.render import cited_passage_ids
from graftwork.serving.api.errors import ApiError
from graftwork.serving.arms import ArmPrompt
from graftwork.serving.engine import Engine
from graftwork.serving.engine.request import GenerateRequest, TokenEvent
from graftwork.serving.messages import AnswerDelta, ArmAnswer, ArmRequest, Spelled, StreamStart, TokenLogprob

_UNLIKELY = -9999.0
"""Stands for minus infinity, which JSON lacks; the OpenAI API's own stand-in."""
HOLE = "\ufffd"
"""Replacement character that a decoder writes for bytes that are no character yet."""


async def generate(
    engine: Engine, requests: Sequence[GenerateRequest], on_end: Callable[[], None]
) -> AsyncGenerator[dict[int, list[TokenEvent]]]:
    """Submit the requests of one call; yield the events that have arrived since the last step, by request.

    The first item is empty: all requests are queued. Ends with the last event of the last request; closing it earlier
    cancels what still runs. `on_end` is called once, when the engine has released all requests, on the event loop.
    Raises what `Engine.submit` raises; then nothing stays queued.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[TokenEvent]()
    index = {request.request_id: number for number, request in enumerate(requests)}
    running: set[str] = set()

    def post(event: TokenEvent) -> None:
        """Called by the engine's thread for each event."""
        if not loop.is_closed():  # closed: the replica is going down and nobody reads any more
            loop.call_soon_threadsafe(take, event)

    def take(event: TokenEvent) -> None:
        arrived.put_nowait(event)
        if event.finish_reason is not None:
            running.discard(event.request_id)
            if not running:
                on_end()

    try:
        try:
            for request in requests:
                engine.submit(request, post)
                running.add(request.request_id)
        except BaseException:  # whatever refuses a request: its adapter must not stay pinned
            if not running:
                on_end()
            raise
        yield {}
        left = len(index)
        while left:
            ready = [await arrived.get()]
            while not arrived.empty():
                ready.append(arrived.get_nowait())
            by_request: dict[int, list[TokenEvent]] = {}
            for event in ready:
                by_request.setdefault(index[event.request_id], []).append(event)
                left -= event.finish_reason is not None
            yield by_request
    finally:
        for request_id in running:
            engine.cancel(request_id)


def engine_failure(event: TokenEvent) -> ApiError:
    """Return the error of an event that ends its request without what was asked for: `error` or `cancelled`."""
    if event.finish_reason == "error":
        return ApiError(500, f"The engine failed on this request: {event.error}", code="engine_error")
    return ApiError(503, "The request was cancelled because the engine is going down.", code="engine_stopping")


@dataclass(slots=True)
class StreamedAnswer:
    """Tokens of one request become an `ArmAnswer`."""

    index: int
    prompt: ArmPrompt
    stop_ids: frozenset[int]
    """Tokens that end the answer and are no part of its text."""
    arrived: float
    """`time.perf_counter` of the call."""
    text: "TextStream"
    logprobs: "LogprobStream | None" = None
    """Collects log probabilities where they are asked for."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    """Set by the answer's last event."""
    ttft_ms: float | None = None
    cached_tokens: int = 0

    def add(self, events: Sequence[TokenEvent]) -> AnswerDelta:
        """Return the text that is certain now, with its log probabilities. Raises ApiError where the engine failed."""
        if self.ttft_ms is None:
            self.ttft_ms, self.cached_tokens = (time.perf_counter() - self.arrived) * 1000, events[0].cached_tokens
        text = ""
        for event in events:
            if event.finish_reason in ("error", "cancelled"):
                raise engine_failure(event)
            self.finish_reason = event.finish_reason or ""
            if event.token_id < 0:
                continue
            self.token_ids.append(event.token_id)
            if event.token_id not in self.stop_ids:
                if self.logprobs is not None:
                    self.logprobs.push(event)
                text += self.text.push(event.token_id)
        if self.finish_reason:
            text += self.text.push(None)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.logprobs is not None:
            whole = bool(self.finish_reason) and not self.text.stopped
            logprobs = tuple(self.logprobs.take(len(self.text.text), whole=whole))
        return AnswerDelta(self.index, text, len(self.token_ids), logprobs)

    def answer(self, request: ArmRequest, task: str | None, start: StreamStart, *, cold: bool) -> ArmAnswer:
        """Return the whole answer, once the last event was added."""
        prompt, text = self.prompt, self.text.text
        return ArmAnswer(
            request_id=request.request_id,
            arm=request.arm.name,
            text=text,
            adapter=task,
            adapter_version=start.adapter_version,
            base_digest=start.base_digest,
            retrieved_ids=prompt.retrieved_ids,
            prompt_tokens=start.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=len(self.token_ids),
            ttft_ms=self.ttft_ms or 0.0,
            latency_ms=(time.perf_counter() - self.arrived) * 1000,
            finish_reason=self.finish_reason,
            token_ids=tuple(self.token_ids),
            index=self.index,
            logprobs=tuple(self.logprobs.released) if self.logprobs is not None else None,
            left_out_ids=prompt.left_out_ids,
            cited_ids=cited_passage_ids(text, prompt.retrieved_ids) if prompt.citations else (),
            cold=cold,
        )


@dataclass(slots=True)
class TextStream:
    """The text of one growing answer. All pieces joined equal the decoded whole, up to a stop string.

    Only the last few tokens are decoded again with each new one. Those before `_sent_ids` are there for their context:
    some tokenizers write the first token of a text differently (without its leading space).
    """

    decode: Callable[[Sequence[int]], str]
    stop: Sequence[str] = ()
    text: str = ""
    """Everything released so far."""
    stopped: bool = False
    """A stop string was met; what follows it is dropped."""
    _ids: list[int] = field(default_factory=list)
    _start: int = 0
    _sent_ids: int = 0
    _pending: str = ""

    def push(self, token_id: int | None) -> str:
        """Return the text that is certain now that this token came; often empty.

        None ends the text: everything pending is released, an unfinished character as the decoder's replacement.
        """
        if token_id is not None:
            self._ids.append(token_id)
        before = self.decode(self._ids[self._start : self._sent_ids])
        now = self.decode(self._ids[self._start :])
        if token_id is not None and (now.endswith(HOLE) or len(now) <= len(before)):
            return ""
        self._start, self._sent_ids = self._sent_ids, len(self._ids)
        if self.stopped:
            return ""
        pending = self._pending + now[len(before) :]
        ready = len(pending)
        if self.stop:
            found = [at for at in (pending.find(stop) for stop in self.stop) if at >= 0]
            self.stopped = bool(found)
            ready = min(found) if found else ready - (0 if token_id is None else self._open_length(pending))
        self._pending = "" if self.stopped else pending[ready:]
        self.text += pending[:ready]
        return pending[:ready]

    def _open_length(self, pending: str) -> int:
        """Length of the longest end of the pending text that may grow into a stop string."""
        longest = max(len(stop) - 1 for stop in self.stop)
        for size in range(min(longest, len(pending)), 0, -1):
            if any(stop.startswith(pending[-size:]) for stop in self.stop):
                return size
        return 0


class LogprobStream:
    """Collects the log probabilities of tokens and releases those whose text has been released.

    spell: bytes of a token. silent: tokens that leave no trace in the text (control tokens).
    """

    def __init__(self, spell: Callable[[int], bytes], silent: Container[int]) -> None:
        self._spell, self._silent = spell, silent
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._pending: list[TokenLogprob] = []
        self.released: list[TokenLogprob] = []
        """All that was released."""

    def push(self, event: TokenEvent) -> None:
        """One token of the answer, not one that ends it."""
        spelled = self._spell(event.token_id)
        token = _make_spelled(spelled, event.logprob)
        top = tuple(_make_spelled(self._spell(token_id), logprob) for token_id, logprob in event.top)
        self._pending.append(TokenLogprob(token, top, self._length))
        if event.token_id not in self._silent:
            self._length += len(self._characters.decode(spelled))

    def take(self, text_length: int, *, whole: bool = False) -> list[TokenLogprob]:
        """Those that begin within the first `text_length` characters. whole: the answer ended of itself: the rest."""
        ready = self._pending if whole else [one for one in self._pending if one.offset < text_length]
        self._pending = self._pending[len(ready) :]
        self.released += ready
        return ready


def _make_spelled(spelled: bytes, logprob: float | None) -> Spelled:
    assert logprob is not None, "the request asked for log probabilities"
    return Spelled(tuple(spelled), max(logprob, _UNLIKELY))
