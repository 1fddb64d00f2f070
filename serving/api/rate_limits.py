"""Rate limits of callers: requests and tokens a minute for each API key, wrong tokens for each address.

A rate limit is a token bucket in the one ingress process. A bucket holds one minute's worth and refills evenly, so a
burst of a minute's allowance passes and then the rate holds. Tokens are reserved when a request is admitted, as many as
it can take at most, and settled when it ends, however it ends. A request that can take more than a minute's worth is
admitted by a full bucket alone; the level then falls below zero, and the bucket refuses requests until it has refilled.
"""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field

from graftwork.serving.api.errors import ApiError
from graftwork.serving.messages import StreamChunk, StreamStart
from graftwork.serving.spec import LimitsSpec

ADDRESSES = 4096
"""Addresses whose wrong tokens are counted; with more, the least recently seen one is dropped."""
Clock = Callable[[], float]
ADMIN = "admin"
ANYBODY = "anybody"
"""Name of the caller where no token is needed."""
caller: ContextVar[str] = ContextVar("caller", default=ANYBODY)
"""Name of the key that the running HTTP request was made with."""


@dataclass(slots=True)
class Bucket:
    """`per_min` units a minute. `level` may fall below zero; then nothing passes until it has risen above it."""

    per_min: int
    clock: Clock
    level: float = 0.0
    seen: float = 0.0

    def __post_init__(self) -> None:
        self.level, self.seen = float(self.per_min), self.clock()

    def change(self, per_min: int) -> None:
        """Another rate from now on; the same share of a minute's worth is left."""
        self.wait_s(0)
        self.level, self.per_min = self.level * per_min / self.per_min, per_min

    def wait_s(self, least: float) -> float:
        """Seconds until at least `least` units are there; 0 now."""
        now = self.clock()
        self.level = min(float(self.per_min), self.level + (now - self.seen) * self.per_min / 60)
        self.seen = now
        return max(0.0, (least - self.level) * 60 / self.per_min)


@dataclass(slots=True)
class Reservation:
    """Tokens that a bucket holds back for one request. None: the caller has no limit."""

    bucket: Bucket | None
    tokens: int = 0

    def resize(self, tokens: int) -> None:
        """Hold this many tokens from now on; the last call is the charge."""
        if self.bucket is not None:
            self.bucket.level += self.tokens - tokens
        self.tokens = tokens


@dataclass(frozen=True, slots=True)
class RequestSize:
    """Bounds of the tokens of one request, before its prompt is tokenised.

    A token holds at least one byte of text. What template, arm and passages add to the text is learned from the model's
    earlier prompts; before the first the whole sequence counts.
    """

    model: str
    text_bytes: int
    answers: int
    max_new_tokens: int
    """Most tokens of one answer."""
    room: int
    """engine.max_seq_len."""

    def at_most(self, prompt: int) -> int:
        """Tokens of the request with so many in its prompt."""
        return min(prompt + self.answers * self.max_new_tokens, self.answers * self.room)


@dataclass(slots=True)
class RateLimits:
    """The buckets of each caller. Names come from the endpoint's own keys, so there are only so many."""

    spec: LimitsSpec
    clock: Clock = time.monotonic
    _requests: dict[str, Bucket] = field(default_factory=dict)
    _tokens: dict[str, Bucket] = field(default_factory=dict)
    _template_tokens: dict[str, int] = field(default_factory=dict)
    """Most tokens of a prompt beyond its text's bytes, by model."""
    _wrong_tokens: OrderedDict[str, Bucket] = field(default_factory=OrderedDict)

    def take(self, spec: LimitsSpec) -> None:
        """Other limits from now on. What a caller has used up stays used up."""
        self.spec = spec
        for bucket in self._wrong_tokens.values():
            bucket.change(spec.wrong_tokens_per_min)
        for buckets, per_min in ((self._requests, spec.requests_per_min), (self._tokens, spec.tokens_per_min)):
            if per_min is None:
                buckets.clear()
                continue
            for bucket in buckets.values():
                bucket.change(per_min)

    def admit(self, name: str) -> None:
        """Count one request. Raises ApiError 429 that says when to come again; then it isn't counted."""
        waits: dict[str, float] = {}
        if self.spec.tokens_per_min is not None:
            waits["tokens"] = self._bucket(self._tokens, name, self.spec.tokens_per_min).wait_s(1)
        if self.spec.requests_per_min is not None:
            waits["requests"] = self._bucket(self._requests, name, self.spec.requests_per_min).wait_s(1)
        for what, wait_s in waits.items():
            if wait_s > 0:
                raise _too_many(name, what, wait_s)
        if self.spec.requests_per_min is not None:
            self._requests[name].level -= 1

    def reserve(self, name: str, tokens: int) -> Reservation:
        """Hold tokens back. Raises ApiError 429 where the bucket has too few. The admin's requests are free."""
        if self.spec.tokens_per_min is None or name == ADMIN:
            return Reservation(None)
        bucket = self._bucket(self._tokens, name, self.spec.tokens_per_min)
        if (wait_s := bucket.wait_s(min(tokens, self.spec.tokens_per_min))) > 0:
            raise _too_many(name, "tokens", wait_s)
        reservation = Reservation(bucket)
        reservation.resize(tokens)
        return reservation

    async def metered(
        self, name: str, chunks: AsyncGenerator[StreamChunk], size: RequestSize
    ) -> AsyncGenerator[StreamChunk]:
        """Pass on the stream of `EngineReplica.stream`: reserve its tokens first, charge the computed ones at its end.

        Raises ApiError 429.
        """
        added = self._template_tokens.get(size.model, size.room)
        reservation = self.reserve(name, size.at_most(min(size.room, size.text_bytes + added)))
        prompt, given = 0, Counter[int]()
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if isinstance(chunk, StreamStart):
                        prompt = chunk.prompt_tokens
                        self._template_tokens[size.model] = max(
                            prompt - size.text_bytes, self._template_tokens.get(size.model, 0)
                        )
                        reservation.resize(size.at_most(prompt))
                    else:
                        given[chunk.index] = chunk.completion_tokens
                    yield chunk
        finally:
            reservation.resize(prompt + given.total())

    def count_wrong_token(self, address: str) -> None:
        """Raises ApiError 429 for more from this address than a minute allows."""
        bucket = self._bucket(self._wrong_tokens, address, self.spec.wrong_tokens_per_min)
        self._wrong_tokens.move_to_end(address)
        if len(self._wrong_tokens) > ADDRESSES:
            self._wrong_tokens.popitem(last=False)
        if (wait_s := bucket.wait_s(1)) > 0:
            seconds = math.ceil(wait_s)
            message = f"Too many wrong API keys from {address}. Try again in {seconds} s with a valid key."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=seconds)
        bucket.level -= 1

    def _bucket(self, buckets: dict[str, Bucket], name: str, per_min: int) -> Bucket:
        if name not in buckets:
            buckets[name] = Bucket(per_min, self.clock)
        return buckets[name]


def _too_many(name: str, what: str, wait_s: float) -> ApiError:
    seconds = math.ceil(wait_s)
    message = f"Rate limit reached for key {name!r} in {what} per minute. Try again in {seconds} s."
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=seconds)
