"""A Hugging Face hub on this machine: the routes of huggingface_hub 2.4 and datasets 5.2 that read repositories.

Errors have the status and the `X-Error-Code` of the real hub (huggingface_hub/utils/_http.py: hf_raise_for_status).
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(
    r"/api/(?P<kind>datasets|models)/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+)(/(?P<path>.*))?)?"
)
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
Files = Mapping[str, bytes]


@dataclass
class Hub:
    """Repositories by `datasets/OWNER/NAME` or `models/OWNER/NAME`, each with its files by revision."""

    repositories: dict[str, dict[str, Files]]
    gated: frozenset[str] = frozenset()
    """Repositories that need the token `granted`."""
    url: str = ""
    requests: list[str] = field(default_factory=list)
    """Paths that were asked for."""


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """Serve the repositories on a free port of this machine; `hub.url` is what HF_ENDPOINT takes."""

    class Handler(_Handler):
        repositories = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    repositories: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        self.repositories.requests.append(path)
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        if match is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        found = match.groupdict()
        name = f"{(found['kind'] or 'models').strip('/')}/{found['id']}"
        revisions = self.repositories.repositories.get(name)
        allowed = self.headers.get("Authorization") == "Bearer granted"
        if revisions is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif name in self.repositories.gated and not allowed:
            status = 403 if self.headers.get("Authorization") else 401
            self._send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted"})
        elif (commit := _commit(revisions, found["rev"] or "main")) is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/"):
            self._describe(found, revisions[commit[0]], commit[1], body)
        else:
            self._file(found["path"], revisions[commit[0]], commit[1])

    def _describe(self, found: Mapping[str, str | None], files: Files, commit: str, body: str) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(files[name]), "oid": _digest(files[name])} for name in files
        ]
        if found["what"] == "tree":
            folder = f"{found['path']}/" if found["path"] else ""
            folders = {parent for name in files for parent in _parents(name)}
            entries += [{"type": "directory", "path": name, "oid": commit, "size": 0} for name in sorted(folders)]
            inside = [entry for entry in entries if str(entry["path"]).startswith(folder)]
            if "recursive=true" not in urlsplit(self.path).query.lower():
                inside = [entry for entry in inside if "/" not in str(entry["path"]).removeprefix(folder)]
            self._json(inside) if inside else self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif found["what"] == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            folders = {parent for name in files for parent in _parents(name)}
            more = [{"type": "directory", "path": path, "oid": commit} for path in asked if path in folders]
            self._json([entry for entry in entries if entry["path"] in asked] + more)
        else:
            siblings = [{"rfilename": name} for name in files]
            info = {
                "id": found["id"],
                "sha": commit,
                "siblings": siblings,
                "tags": [],
                "private": False,
                "gated": False,
            }
            self._json(info)

    def _file(self, path: str, files: Files, commit: str) -> None:
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = files[path]
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _commit(revisions: Mapping[str, Files], revision: str) -> tuple[str, str] | None:
    """(name, commit) of a revision, which is given by either."""
    names = {name: hashlib.sha1(name.encode()).hexdigest() for name in revisions}
    return next(((name, commit) for name, commit in names.items() if revision in (name, commit)), None)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _parents(name: str) -> Iterator[str]:
    parts = name.split("/")
    yield from ("/".join(parts[:end]) for end in range(1, len(parts)))
