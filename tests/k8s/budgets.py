"""PodDisruptionBudgets for the API server under test, whose CRDs cannot be of the group `policy`.

`with Budgets(server):` serves these in memory, with the answers of `kube-apiserver`, and passes other calls on to the
server. No disruption controller acts on them.
"""

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from tests.k8s.server import NAMESPACE, ApiServer, write_kubeconfig
from tests.ports import free_port

FOLDER = f"/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets"


class Budgets:
    """While it is open, the server's kubeconfig leads here. `objects` are the budgets by name."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.port = server, free_port()
        self.objects: dict[str, dict[str, Any]] = {}
        self._version = 0

    def __enter__(self) -> "Budgets":
        keys = self.server.folder
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self._http.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys / "server.crt", keys / "server.key")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="budgets", daemon=True).start()
        write_kubeconfig(self.server.kubeconfig, f"https://127.0.0.1:{self.port}", keys)
        return self

    def __exit__(self, *_: object) -> None:
        write_kubeconfig(self.server.kubeconfig, self.server.url, self.server.folder)
        self._http.shutdown()
        self._http.server_close()

    def ask(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        """Return code and answer of a call."""
        path, query = urlparse(url).path, parse_qs(urlparse(url).query)
        if not path.startswith(FOLDER):
            return self.server.ask(method, url, body)
        if path == FOLDER and method == "GET":
            wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
            items = [one for one in self.objects.values() if wanted.items() <= one["metadata"]["labels"].items()]
            return 200, {"kind": "PodDisruptionBudgetList", "items": items, "metadata": {}}
        name = body["metadata"]["name"] if method == "POST" else path.removeprefix(f"{FOLDER}/")
        found = self.objects.get(name)
        if method == "POST" and found is None:
            return 201, self._store(name, body)
        if method == "POST":
            return _status(409, name, "AlreadyExists")
        if found is None:
            return _status(404, name, "NotFound")
        if method == "PUT" and body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
            return _status(409, name, "Conflict")
        if method == "PUT":
            return 200, self._store(name, body)
        return 200, self.objects.pop(name) if method == "DELETE" else found

    def _store(self, name: str, body: Any) -> dict[str, Any]:
        self._version += 1
        self.objects[name] = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self._version)}}
        return self.objects[name]


def _status(code: int, name: str, reason: str) -> tuple[int, dict[str, Any]]:
    details = {"name": name, "group": "policy", "kind": "poddisruptionbudgets"}
    return code, {"kind": "Status", "status": "Failure", "reason": reason, "details": details, "code": code}


def _handler(budgets: Budgets) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, answer = budgets.ask(self.command, self.path, json.loads(text) if text else None)
            data = json.dumps(answer).encode()
            self.send_response(code or 502)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler
