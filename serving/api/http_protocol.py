"""Limits on connections that uvicorn lacks: time for a request's head, time for its body, connections at once.

Ray Serve's HTTP proxy is uvicorn, which waits without end for the rest of a request that began. Serve has no option for
it and no middleware sees a request before its head is complete, so the protocol itself is replaced: Ray calls `install`
in each proxy before uvicorn starts, where the variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it (Ray 2.60,
serve/_private/http_util.py). A private Ray of this package sets that variable.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 10.0
"""From the connection, or from the first byte of a further request, to the end of the head."""
BODY_TIMEOUT_S = 60.0
"""From the end of the head to the end of the body. Later than the app's own limit, which answers with a status."""
MAX_CONNECTIONS = 4096
"""Connections that one proxy holds, idle ones included; a further one is closed at once."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    head_timeout_s, body_timeout_s, max_connections = HEAD_TIMEOUT_S, BODY_TIMEOUT_S, MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Start the time of the first head."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._set_deadline(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """End all timers."""
        self._set_deadline(None)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start the time of a head: the parser has seen its first byte."""
        super().on_message_begin()
        self._set_deadline(self.head_timeout_s)

    def on_headers_complete(self) -> None:
        """Start the time of the body."""
        super().on_headers_complete()
        self._set_deadline(self.body_timeout_s)

    def on_message_complete(self) -> None:
        """The request is complete; from here on the app's own timeout counts."""
        self._set_deadline(None)
        super().on_message_complete()

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        if self.flow.read_paused:  # the app reads slowly, not the client
            self._set_deadline(seconds)
        else:
            self.transport.abort()


def install() -> list[Any]:
    """Make uvicorn use `BoundedHttpProtocol` in this process. Returns no middleware: Ray's callback may give some."""
    auto.AutoHTTPProtocol = BoundedHttpProtocol
    return []
