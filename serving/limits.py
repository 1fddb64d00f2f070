"""How much one key may ask for: requests and tokens a minute, as token buckets in the one ingress process.

A bucket holds one minute's worth and refills evenly, so a burst of a minute's allowance passes and then the rate holds.
Tokens are known only afterwards: they are charged when an answer ends, and a bucket in debt refuses until it is paid.
"""

import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field

from graftwork.serving.api_error import ApiError
from graftwork.serving.arms import Dump
from graftwork.serving.spec import LimitsSpec

Clock = Callable[[], float]
ADMIN = "admin"
ANYBODY = "anybody"
"""Who asks where no token is wanted."""
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
class RateLimits:
    """The buckets of each caller. Names come from the endpoint's own keys, so there are only so many."""

    spec: LimitsSpec
    clock: Clock = time.monotonic
    _requests: dict[str, Bucket] = field(default_factory=dict)
    _tokens: dict[str, Bucket] = field(default_factory=dict)

    def take(self, spec: LimitsSpec) -> None:
        """Other limits from now on. What a caller has used up stays used up."""
        self.spec = spec
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

    def charge(self, name: str, answer: Dump) -> None:
        """Count the tokens of an answer (`ArmAnswer.dump`), and the prompt with the first."""
        self.spend(name, answer["completion_tokens"] + (0 if answer["index"] else answer["prompt_tokens"]))

    def spend(self, name: str, tokens: int) -> None:
        """Count tokens. The owner's own are free."""
        if self.spec.tokens_per_min is not None and name != ADMIN:
            bucket = self._bucket(self._tokens, name, self.spec.tokens_per_min)
            bucket.wait_s(0)
            bucket.level -= tokens

    async def metered(self, chunks: AsyncGenerator[Dump]) -> AsyncGenerator[Dump]:
        """The same stream; the answers that it ends with are charged to the caller."""
        async with aclosing(chunks):
            async for chunk in chunks:
                if "answer" in chunk:
                    self.charge(caller.get(), chunk["answer"])
                yield chunk

    def _bucket(self, buckets: dict[str, Bucket], name: str, per_min: int) -> Bucket:
        if name not in buckets:
            buckets[name] = Bucket(per_min, self.clock)
        return buckets[name]


def _too_many(name: str, what: str, wait_s: float) -> ApiError:
    seconds = math.ceil(wait_s)
    message = f"Rate limit reached for key {name!r} in {what} per minute. Try again in {seconds} s."
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=seconds)
