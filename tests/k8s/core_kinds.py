"""Core kinds for the API server under test, which has none: a server that lists and watches a fixed set of objects.

The admission of `kube-apiserver` reads policies, bindings, namespaces and parameters from an API server by list and
watch. The server under test evaluates the policies with Kubernetes' own code; this server only supplies the objects.
"""

import json
import ssl
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from tests.ports import free_port

ADMISSION = "admissionregistration.k8s.io/v1"
KINDS = {
    "/api/v1/namespaces": ("v1", "Namespace", False),
    "/api/v1/configmaps": ("v1", "ConfigMap", True),
    f"/apis/{ADMISSION}/validatingadmissionpolicies": (ADMISSION, "ValidatingAdmissionPolicy", False),
    f"/apis/{ADMISSION}/validatingadmissionpolicybindings": (ADMISSION, "ValidatingAdmissionPolicyBinding", False),
}
"""Path: version, kind and whether it is namespaced."""
VERSION = "7"
"""Of the resources, which never change."""


class CoreKinds:
    """`with CoreKinds(keys, objects) as core:`; its certificate is `server` of the folder `keys`."""

    def __init__(self, keys: Path, objects: Sequence[Mapping[str, Any]]) -> None:
        self._keys, self.port, self.objects = keys, free_port(), [_stored(one) for one in objects]
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> "CoreKinds":
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self._http.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._keys / "server.crt", self._keys / "server.key")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="core kinds", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def of(self, path: str) -> list[Mapping[str, Any]]:
        """The objects of a path of KINDS."""
        version, kind, _ = KINDS[path]
        return [one for one in self.objects if (one["apiVersion"], one["kind"]) == (version, kind)]


def _stored(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """An object as the server would give it back: cluster-wide kinds without a namespace, with defaults."""
    [wide] = [not namespaced for _, kind, namespaced in KINDS.values() if kind == given["kind"]]
    metadata = {**given["metadata"], "uid": f"{given['kind']}-{given['metadata']['name']}", "resourceVersion": VERSION}
    if wide:
        metadata.pop("namespace", None)
    one = {**given, "metadata": metadata}
    if given["kind"] == "ValidatingAdmissionPolicy":
        matches = {
            "matchPolicy": "Equivalent",
            "namespaceSelector": {},
            "objectSelector": {},
            **given["spec"]["matchConstraints"],
        }
        matches["resourceRules"] = [{"scope": "*", **rule} for rule in matches["resourceRules"]]
        one["spec"] = {**given["spec"], "matchConstraints": matches}
    return one


def _discovery(path: str) -> Mapping[str, Any] | None:
    """Return the names of the kinds, for the client's REST mapper."""
    group, version = ADMISSION.split("/")
    named = {"groupVersion": ADMISSION, "version": version}
    whole: dict[str, Mapping[str, Any]] = {
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [{"name": group, "versions": [named], "preferredVersion": named}],
        },
    }
    for prefix in ("/api/v1", f"/apis/{ADMISSION}"):
        resources = [
            {
                "name": key.rpartition("/")[2],
                "singularName": kind.lower(),
                "kind": kind,
                "namespaced": namespaced,
                "verbs": ["get", "list", "watch"],
            }
            for key, (_, kind, namespaced) in KINDS.items()
            if key.startswith(f"{prefix}/")
        ]
        whole[prefix] = {"kind": "APIResourceList", "groupVersion": prefix.split("/", 2)[2], "resources": resources}
    return whole.get(path)


def _handler(core: CoreKinds) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlparse(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if url.path in KINDS and query.get("watch") in ("1", "true"):
                self._watch(url.path, query.get("sendInitialEvents") == "true")
                return
            if url.path in KINDS:
                version, kind, _ = KINDS[url.path]
                self._answer(
                    200,
                    {
                        "apiVersion": version,
                        "kind": f"{kind}List",
                        "items": core.of(url.path),
                        "metadata": {"resourceVersion": VERSION},
                    },
                )
                return
            found = _discovery(url.path)
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            self._answer(200 if found else 404, found or missing)

        def _watch(self, path: str, initial: bool) -> None:
            """All objects and the mark after the last one, where the client asks for them; nothing ever changes."""
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            version, kind, _ = KINDS[path]
            mark = {"resourceVersion": VERSION, "annotations": {"k8s.io/initial-events-end": "true"}}
            events = [{"type": "ADDED", "object": one} for one in core.of(path)]
            events += [{"type": "BOOKMARK", "object": {"apiVersion": version, "kind": kind, "metadata": mark}}]
            for event in events if initial else []:
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            self.wfile.flush()
            core.ended.wait()

        def _answer(self, code: int, answer: Mapping[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
