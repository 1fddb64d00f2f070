"""Access to an endpoint: Host and Origin checks, API keys, rate limits, and the body of a request within its limits.

A rate limit is a token bucket in the one ingress process. A bucket holds one minute's worth and refills evenly, so a
burst of a minute's allowance passes and then the rate holds. Tokens are reserved when a request is admitted, as many as
it can take at most, and settled when it ends, however it ends. A request that can take more than a minute's worth is
admitted by a full bucket alone; the level then falls below zero, and the bucket refuses requests until it has refilled.
"""

import asyncio
import hashlib
import hmac
import math
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from graftwork.errors import ConfigError
from graftwork.serving.api.errors import ApiError
from graftwork.serving.messages import StreamChunk, StreamStart
from graftwork.serving.spec import LOOPBACK, LimitsSpec, ServeSpec

_ANY_ADDRESS = ("0.0.0.0", "::")
_PROBES = ("/health", "/ready")
"""Routes that a load balancer or a kubelet calls by a pod's address; they show nothing of the endpoint."""


class HostAndOrigin:
    """ASGI middleware that answers 403 for a Host or an Origin that the spec does not allow.

    A page of any website can send requests to a loopback address. Without a token nothing else distinguishes it from
    the user: `Host` names the page's own site where its DNS name was bound to this address, `Origin` the site that a
    request comes from, and a browser sends a body as application/json to another origin only where that origin allows
    it.
    """

    def __init__(self, app: ASGIApp, spec: ServeSpec) -> None:
        self._app, self._origins = app, {origin.lower() for origin in spec.allowed_origins}
        self._hosts = {host.lower() for host in (*LOOPBACK, spec.host, *spec.allowed_hosts)}
        self._any_host = spec.host in _ANY_ADDRESS and not spec.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        checked = scope["type"] == "http" and scope["path"] not in _PROBES
        problem = self._problem(Headers(scope=scope)) if checked else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(problem.body(), problem.status)(scope, receive, send)

    def _problem(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._any_host:
            try:
                name = urlsplit(f"//{host}").hostname
            except ValueError:
                name = None
            if name not in self._hosts:
                return ApiError(
                    403,
                    f"The Host {host[:80]!r} is not allowed: add it to allowed_hosts of the serve spec.",
                    code="host_not_allowed",
                )
        if origin is None or origin.lower() in self._origins or origin.lower().partition("://")[2] == host.lower():
            return None
        return ApiError(
            403,
            f"Web pages of {origin[:80]!r} may not call this endpoint: add the origin to "
            "allowed_origins of the serve spec.",
            code="origin_not_allowed",
        )


ADDRESSES = 4096
"""Addresses whose wrong tokens are counted; with more, the least recently seen one is dropped."""
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
    _added: dict[str, int] = field(default_factory=dict)
    """Most tokens of a prompt beyond its text's bytes, by model."""
    _wrong: OrderedDict[str, Bucket] = field(default_factory=OrderedDict)

    def take(self, spec: LimitsSpec) -> None:
        """Other limits from now on. What a caller has used up stays used up."""
        self.spec = spec
        for bucket in self._wrong.values():
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
        reservation = self.reserve(name, size.at_most(min(size.room, size.text_bytes + self._added_to(size))))
        prompt, given = 0, Counter[int]()
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if isinstance(chunk, StreamStart):
                        prompt = chunk.prompt_tokens
                        self._added[size.model] = max(prompt - size.text_bytes, self._added.get(size.model, 0))
                        reservation.resize(size.at_most(prompt))
                    else:
                        given[chunk.index] = chunk.completion_tokens
                    yield chunk
        finally:
            reservation.resize(prompt + given.total())

    def _added_to(self, size: RequestSize) -> int:
        return self._added.get(size.model, size.room)

    def count_wrong_token(self, address: str) -> None:
        """Raises ApiError 429 for more from this address than a minute allows."""
        bucket = self._bucket(self._wrong, address, self.spec.wrong_tokens_per_min)
        self._wrong.move_to_end(address)
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)
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


_NAMED = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]{0,62}):(?P<token>\S.*)$")


@dataclass(frozen=True)
class Keys:
    """sha256 hex digests of the accepted tokens. Without any, the endpoint is open (loopback only: see ServeSpec).

    A token is compared in constant time with every known digest, so neither the time nor a memory dump reveals it. The
    admin's token opens everything, a user's never the admin routes.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    """By name of the key."""
    admin: str | None = None

    def name_of(self, authorization: str) -> str | None:
        """The caller's name for an Authorization header, None where its token is unknown."""
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip())
        known = {**self.users, **({ADMIN: self.admin} if self.admin else {})}
        found = [name for name, expected in known.items() if hmac.compare_digest(digest, expected)]
        return found[0] if found and scheme.lower() == "bearer" else None


def tokens_of(variable: str | None, key: str) -> dict[str, str]:
    """{name: token} from an environment variable: one token, or lines `name:token`. Empty where `variable` is None.

    Raises ConfigError for a variable that is not set, a line without a name, or a name twice. key: the spec's key.
    """
    if variable is None:
        return {}
    lines = [line.strip() for line in os.environ.get(variable, "").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(
            f"{key}={variable}",
            "that environment variable is not set",
            "it holds the API token",
            f"export {variable}=$(openssl rand -hex 24)",
        )
    if len(lines) == 1 and not _NAMED.match(lines[0]):
        return {"default": lines[0]}
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _NAMED.match(line)
        if match is None or match["name"] in found or match["name"] in (ADMIN, ANYBODY):
            raise ConfigError(
                f"{key}={variable}",
                f"line {number} is no `name:token` with a name of its own",
                "one token, or a line `name:token` for each caller",
            )
        found[match["name"]] = match["token"]
    return found


def keys_of(spec: ServeSpec) -> Keys:
    """The digests of the spec's tokens, from this process's environment. Raises ConfigError as `tokens_of`."""
    users = {name: _digest(token) for name, token in tokens_of(spec.token_env, "token_env").items()}
    admin = own_token(spec.admin_token_env, "admin_token_env")
    return Keys(users, _digest(admin) if admin else None)


def own_token(variable: str | None, key: str) -> str | None:
    """The first token of a variable, for our own calls."""
    return next(iter(tokens_of(variable, key).values()), None)


def user_check(keys: Keys, limits: RateLimits) -> Callable[[Request], Awaitable[None]]:
    """The guard of every /v1 route: 401 for an unknown token, 429 for one that asked too much. Sets `caller`."""

    async def check(request: Request) -> None:
        name = keys.name_of(request.headers.get("authorization", "")) if keys.users or keys.admin else ANYBODY
        if name is None and (keys.users or request.headers.get("authorization")):
            raise _unauthorized(request, limits)
        caller.set(name or ANYBODY)
        if request.method == "POST" and name != ADMIN:
            limits.admit(name or ANYBODY)

    return check


def admin_check(keys: Keys, limits: RateLimits) -> Callable[[Request], Awaitable[None]]:
    """The guard of the admin routes.

    With an admin token, that token alone opens them. Without one they are open only where everything is: on loopback
    with no user token either. A user token without an admin token closes them.
    """

    async def check(request: Request) -> None:
        name = keys.name_of(request.headers.get("authorization", ""))
        if keys.admin is None and not keys.users:
            return
        if name is None:
            raise _unauthorized(request, limits)
        if name != ADMIN:
            found = "" if keys.admin else " This endpoint has none: set admin_token_env in its spec."
            raise ApiError(403, f"This needs the admin token.{found}", code="admin_only")

    return check


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _unauthorized(request: Request, limits: RateLimits) -> ApiError:
    if request.headers.get("authorization"):
        limits.count_wrong_token(request.client.host if request.client else "")
    return ApiError(401, "Missing or wrong API key: send 'Authorization: Bearer KEY'.", code="invalid_api_key")


MAX_BODY_BYTES = 4 * 2**20
"""A larger body is refused before all of it is read: a prompt of 128k tokens takes about 0.6 MB."""
BODY_TIMEOUT_S = 30.0
"""From the end of the head to the end of the body."""


async def read_body(request: Request) -> bytes:
    """Return the whole JSON body.

    Raises ApiError: 415 not declared as application/json, 413 larger than MAX_BODY_BYTES, 408 too slow, 499 the client
    has left.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"The body's type is {kind[:80]!r}: send it as JSON, with the header 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "0")
    parts, size, too_large = [], 0, declared.isdecimal() and int(declared) > MAX_BODY_BYTES
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if not too_large:
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if too_large := size > MAX_BODY_BYTES:
                        break
    except TimeoutError:
        message = f"The body was not complete after {BODY_TIMEOUT_S:g} s. Send the request again."
        raise ApiError(408, message, code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(499, "The client closed the connection within the body.", code="client_disconnected") from None
    if too_large:
        message = f"The body is larger than {MAX_BODY_BYTES} bytes. Send a shorter prompt or fewer texts."
        raise ApiError(413, message, code="request_too_large")
    return b"".join(parts)
