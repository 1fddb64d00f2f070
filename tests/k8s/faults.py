"""A TLS proxy before the API server that fails as told: codes, cut connections, latency, answers of kinds not there."""

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from tests.k8s.server import ApiServer, write_kubeconfig
from tests.ports import free_port

REASONS = {
    403: "Forbidden",
    404: "NotFound",
    409: "AlreadyExists",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    401: "Unauthorized",
    422: "Invalid",
}


@dataclass
class Fault:
    """What happens to the next `times` requests of that method and path."""

    method: str
    path: re.Pattern[str]
    times: int
    code: int = 0
    """Answered without asking the server; 0: the server is asked."""
    body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: Literal["", "before", "after"] = ""
    """The connection is reset: before the server is asked, or after it has done what was asked."""
    delay_s: float = 0.0


class Faults:
    """`with Faults(server) as faults:`; clients come in by `faults.kubeconfig`."""

    def __init__(self, server: ApiServer, certificate: str = "server") -> None:
        self._server, self._certificate, self.port = server, certificate, free_port()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.asked: list[tuple[str, str]] = []
        self.kubeconfig: Path = server.folder / f"through-{self.port}.yaml"

    def __enter__(self) -> "Faults":
        write_kubeconfig(self.kubeconfig, f"https://127.0.0.1:{self.port}", self._server.folder)
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self), bind_and_activate=True)
        self._http.daemon_threads = True
        folder, name = self._server.folder, self._certificate
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="faults", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def refuse(
        self, code: int, message: str = "", *, method: str = ".*", path: str = "", times: int = 1, **headers: str
    ) -> None:
        """Answer with a Status as an API server does. Headers: `Retry_After="1"`."""
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": message,
            "code": code,
            "reason": REASONS.get(code, "Unknown"),
        }
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.add(Fault(method, re.compile(path), times, code, status, named))

    def answer(self, path: str, body: Mapping[str, Any], *, method: str = "GET", code: int = 200) -> None:
        """Always, for what the server itself does not have: a Secret, a review of rights."""
        self.add(Fault(method, re.compile(path), 10**9, code, body))

    def absent(self, path: str, name: str) -> None:
        """A kind that is served and has no such object."""
        details = {"name": name}
        self.answer(path, {"kind": "Status", "code": 404, "message": f"{name} not found", "details": details}, code=404)

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            self.asked.clear()

    def next(self, method: str, path: str) -> Fault | None:
        """Takes one of its times off the first fault that is for such a request."""
        with self._lock:
            self.asked.append((method, path))
            for fault in self._faults:
                if fault.times and re.fullmatch(fault.method, method) and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def forward(self, method: str, path: str, body: Any, kind: str) -> tuple[int, Any]:
        return self._server.ask(method, path, body, kind)


def _handler(faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fault = faults.next(self.command, self.path) or Fault("", re.compile(""), 1)
            time.sleep(fault.delay_s)
            if fault.cut == "before":
                self._cut()
                return
            code, answer = fault.code, fault.body
            if not code:
                kind = self.headers.get("Content-Type") or "application/json"
                code, answer = faults.forward(self.command, self.path, body, kind)
            if fault.cut == "after" or not code:
                self._cut()
                return
            self._answer(code, answer, fault.headers)

        def _answer(self, code: int, answer: Any, headers: Mapping[str, str]) -> None:
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def _cut(self) -> None:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.connection.close()

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = _do

    return Handler
