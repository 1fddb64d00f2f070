"""HTTP requests by route and status, counted where they leave: what never reached an engine is in here too."""

from collections import Counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftwork.serving.metrics_families import Family

_ELSEWHERE = "unmatched"
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
"""Routes and methods that do not exist share one label each: callers must not invent series."""


class CountedHttp:
    """ASGI middleware. A stream counts when its head is sent; it adds one dictionary write to a request."""

    def __init__(self, app: ASGIApp, counts: Counter[tuple[str, str, str]]) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts[_route(scope), _method(scope), str(message["status"])] += 1
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


def http_families(counts: Counter[tuple[str, str, str]]) -> list[Family]:
    """The counter as a family."""
    values: list[Any] = [(labels, count) for labels, count in sorted(counts.items())]
    text = "HTTP responses begun, by route, method and status."
    return [Family("counter", "http_responses", text, ("route", "method", "status"), values)]


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", _ELSEWHERE)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"
