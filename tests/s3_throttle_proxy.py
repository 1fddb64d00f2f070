"""A real HTTP proxy before an S3 server that answers 503 SlowDown to a share of the requests, as a busy S3 does."""

import contextlib
import http.client
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BODY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
NO_CONDITIONS = b'<?xml version="1.0"?><Error><Code>NotImplemented</Code><Message>unknown header</Message></Error>'
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


class SlowDown:
    """`endpoint` takes the place of the server's; `refused` of `asked` requests got a 503.

    Without `conditions` it answers a conditional put as servers do that know none.
    """

    def __init__(self, server: str, share: float, seed: int = 0, *, conditions: bool = True) -> None:
        self.server, self.share, self.conditions = urlsplit(server), share, conditions
        self.asked = self.refused = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _any

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, name="slow-down", daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        """Take no more requests."""
        self._http.shutdown()
        self._http.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Pass it on, Host included, which the signature covers; or refuse it."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._lock:
            refuse = self._random.random() < self.share
            self.asked, self.refused = self.asked + 1, self.refused + refuse
        if not self.conditions and request.headers.get("If-None-Match"):
            _answer(request, 501, {"Content-Type": "application/xml"}, NO_CONDITIONS)
            return
        if refuse:
            _answer(request, 503, {"Content-Type": "application/xml"}, BODY)
            return
        try:
            connection = http.client.HTTPConnection(self.server.netloc, timeout=30)
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
            data, length = answer.read(), answer.getheader("Content-Length")
            connection.close()
        except (OSError, http.client.HTTPException):  # the server is gone: so are we
            request.close_connection = True
            return
        _answer(request, answer.status, headers, data, length if request.command == "HEAD" else None)


def _answer(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, length: str | None = None
) -> None:
    with contextlib.suppress(OSError):
        request.send_response_only(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", length or str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


@contextlib.contextmanager
def slow_down(server: str, share: float, *, conditions: bool = True) -> Iterator[SlowDown]:
    """A proxy for the block."""
    proxy = SlowDown(server, share, conditions=conditions)
    try:
        yield proxy
    finally:
        proxy.close()
