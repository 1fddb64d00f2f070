"""Access to an endpoint: Host and Origin checks, API keys, and the body of a request within its limits."""

import asyncio
import hashlib
import hmac
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from graftwork.errors import ConfigError
from graftwork.serving.api.errors import ApiError
from graftwork.serving.api.rate_limits import ADMIN, ANYBODY, RateLimits, caller
from graftwork.serving.spec import LOOPBACK, ServeSpec

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
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        own_page = origin is None or origin.lower().partition("://")[2] == host.lower()
        if not self._any_host and name not in self._hosts:
            rule, code = "add it to allowed_hosts of the serve spec", "host_not_allowed"
            problem = ApiError(403, f"The Host {host[:80]!r} is not allowed: {rule}.", code=code)
        elif not own_page and str(origin).lower() not in self._origins:
            rule, code = "add the origin to allowed_origins of the serve spec", "origin_not_allowed"
            problem = ApiError(403, f"Web pages of {str(origin)[:80]!r} may not call this endpoint: {rule}.", code=code)
        else:
            await self._app(scope, receive, send)
            return
        await JSONResponse(problem.body(), problem.status)(scope, receive, send)


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
        rates = limits.spec
        if request.method == "POST" and name != ADMIN and (rates.requests_per_min or rates.tokens_per_min):
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
