"""Protection of an endpoint against web pages: which Host and Origin are answered, and JSON bodies only.

A page of any website can send requests to a loopback address. Without a token nothing else distinguishes it from the
user: `Host` names the page's own site where its DNS name was bound to this address, `Origin` the site that a request
comes from, and a browser sends a body as application/json to another origin only where that origin allows it.
"""

from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from graftwork.serving.api_error import ApiError
from graftwork.serving.spec import LOOPBACK, ServeSpec

_ANY_ADDRESS = ("0.0.0.0", "::")
_PROBES = ("/health", "/ready")
"""Routes that a load balancer or a kubelet calls by a pod's address; they show nothing of the endpoint."""


class HostAndOrigin:
    """ASGI middleware that answers 403 for a Host or an Origin that the spec does not allow."""

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
        if not self._any_host and _hostname(host) not in self._hosts:
            return ApiError(403, f"The Host {host[:80]!r} is not allowed: add it to allowed_hosts of the serve spec.",
                            code="host_not_allowed")  # fmt: skip
        if origin is None or origin.lower() in self._origins or origin.lower().partition("://")[2] == host.lower():
            return None
        return ApiError(403, f"Web pages of {origin[:80]!r} may not call this endpoint: add the origin to "
                        "allowed_origins of the serve spec.", code="origin_not_allowed")  # fmt: skip


async def require_json(request: Request) -> None:
    """Raise ApiError 415 for a body that is not declared as application/json."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"The body's type is {kind[:80]!r}: send it as JSON, with the header "
                       "'Content-Type: application/json'.", code="unsupported_media_type")  # fmt: skip


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
