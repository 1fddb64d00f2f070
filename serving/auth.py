"""Who may ask: bearer tokens of users, each with a name, and one of the owner (the admin).

Only digests are kept, and compared in constant time against every known one, so neither the time nor a memory dump
tells a token. The admin's token opens everything, a user's never the admin routes.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from fastapi import Request

from graftwork.errors import ConfigError
from graftwork.serving.api_error import ApiError
from graftwork.serving.limits import ADMIN, ANYBODY, RateLimits, caller
from graftwork.serving.spec import ServeSpec

_NAMED = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]{0,62}):(?P<token>\S.*)$")


@dataclass(frozen=True)
class Keys:
    """sha256 hex digests of the accepted tokens. Without any, the endpoint is open (loopback only: see ServeSpec)."""

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
        raise ConfigError(f"{key}={variable}", "that environment variable is not set",
                          "it holds the API token", f"export {variable}=$(openssl rand -hex 24)")  # fmt: skip
    if len(lines) == 1 and not _NAMED.match(lines[0]):
        return {"default": lines[0]}
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _NAMED.match(line)
        if match is None or match["name"] in found or match["name"] in (ADMIN, ANYBODY):
            raise ConfigError(f"{key}={variable}", f"line {number} is no `name:token` with a name of its own",
                              "one token, or a line `name:token` for each caller")  # fmt: skip
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
