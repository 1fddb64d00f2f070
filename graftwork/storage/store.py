"""Stores of runs, adapters, aliases, data and caches: the only module that joins a path or opens a filesystem.

A `Store` is one root: a folder, `file://` or `s3://` (through s3fs). Keys are given as parts, one name each, never as a
joined string. Credentials come from the environment alone (`AWS_*`); a URI that carries them is refused.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from graftwork.errors import ConfigError, StorageError
from graftwork.storage.local import TMP_PREFIX, LocalFiles, files_under
from graftwork.storage.s3 import S3Objects, endpoint

DEFAULT_ROOT = ".graftwork"
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""A task, a run, an alias, a version."""
ALIAS_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}@[a-z0-9][a-z0-9._-]{0,62}$"
"""`task@alias` or `task@version`."""

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_ALMOST_URI = re.compile(r"(?i)(file|s3|gs|https?):")
_FORMS = "write a path, file:///PATH or s3://BUCKET/PREFIX"
_MAX_PART_BYTES = 255


class Store:
    """One root. Cheap to build and to pickle: nothing is opened before the first read or write.

    `uri` is the normalised root: an absolute path, or `s3://bucket/prefix`. Raises ConfigError for a root that is
    empty, of another scheme, or that carries credentials; StorageError for a part that is no plain name.
    """

    def __init__(self, root: str, patience_s: float = 0.0) -> None:
        self.uri, self._patience_s = _normalise(root), patience_s
        self.is_local = not self.uri.startswith("s3://")
        self._backend: LocalFiles | S3Objects = LocalFiles() if self.is_local else S3Objects(patience_s)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[type["Store"], tuple[str, float]]:
        return Store, (self.uri, self._patience_s)  # each process opens a client of its own environment

    def with_retries(self, patience_s: float) -> "Store":
        """The same root, each call tried again for so long while its server cannot be reached."""
        return Store(self.uri, patience_s)

    def path(self, *parts: str) -> str:
        """Full path (local) or `s3://` URI of a key."""
        for part in parts:
            check_part(part)
        if not self.is_local and any("?" in part for part in parts):
            raise StorageError(
                f"key {'/'.join(parts)}", "it holds '?'", "s3fs reads what follows as a version id", "rename the object"
            )
        return "/".join([self.uri.rstrip("/"), *parts]) if parts else self.uri

    def read_bytes(self, *parts: str) -> bytes:
        """Whole content. StorageError when it is missing or out of reach."""
        data = self.find_bytes(*parts)
        if data is None:
            raise StorageError(f"read {self.path(*parts)}", "it does not exist", "", "check the path")
        return data

    def find_bytes(self, *parts: str) -> bytes | None:
        """Whole content, None where the key is absent: one step, where `exists` and `read_bytes` would be two."""
        return self._backend.read(self.path(*parts))

    def read_text(self, *parts: str) -> str:
        """Whole content as UTF-8. StorageError as in `read_bytes`, or when it is not UTF-8."""
        try:
            return self.read_bytes(*parts).decode()
        except UnicodeDecodeError as error:
            raise StorageError(
                f"read {self.path(*parts)}",
                f"it is not UTF-8 ({error.reason} at byte {error.start})",
                "text is stored as UTF-8",
            ) from error

    def read_json(self, *parts: str) -> Any:
        """Parsed JSON. StorageError as in `read_text`, or when it is not JSON."""
        try:
            return json.loads(self.read_text(*parts))
        except (json.JSONDecodeError, RecursionError) as error:
            raise StorageError(f"read {self.path(*parts)}", f"it is not JSON ({error})") from error

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Replace the key atomically: readers see the old content or the new, whole."""
        self._backend.write(self._key(*parts), data)

    def write_json(self, value: object, *parts: str) -> None:
        """`write_bytes` of indented JSON."""
        self.write_bytes(json_bytes(value), *parts)

    def create_bytes(self, data: bytes, *parts: str) -> bool:
        """Write only where the key is absent. True for the one process that created it, False for all others."""
        return self._backend.create(self._key(*parts), data)

    def append_jsonl(self, record: Mapping[str, object], *parts: str) -> None:
        """Append one JSON line (local roots only; objects on S3 cannot grow, so write them whole)."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
        self._backend.append(self._key(*parts), line.encode())

    def exists(self, *parts: str) -> bool:
        """Return whether a file or a folder exists there."""
        return self._backend.exists(self._key(*parts))

    def list(self, *parts: str) -> list[str]:
        """Names of the children, sorted; empty when there is no such folder. Unfinished writes are not shown."""
        return sorted(self.children(*parts))

    def children(self, *parts: str) -> dict[str, int | None]:
        """Children of a folder with their size in bytes, None for a folder; empty when there is no such folder."""
        return self._backend.children(self.path(*parts))

    def stamps(self, *parts: str) -> dict[str, str]:
        """Files of a folder, each with a mark that changes with its content: ETag on S3, size and time on disk."""
        return self._backend.stamps(self.path(*parts))

    def tree(self, *parts: str) -> dict[tuple[str, ...], str]:
        """Every file below a folder by its parts, stamped as in `stamps`: one listing, however deep the folder is."""
        return self._backend.tree(self._key(*parts))

    def ages(self, *parts: str) -> dict[tuple[str, ...], float]:
        """Every file below a folder by its parts: seconds since it was written, by the storage's own clock alone. One
        listing."""
        return self._backend.ages(self._key(*parts))

    def delete(self, *parts: str) -> None:
        """Remove a file or a folder with all in it; nothing happens when it is absent."""
        self._backend.delete(self._key(*parts))

    def upload(self, local: Path, *parts: str) -> None:
        """Copy a local file, or a folder file by file, to the key. Each file becomes visible whole."""
        if local.is_file():
            self._backend.put_file(self._key(*parts), local)
            return
        if not local.is_dir():
            raise StorageError(f"upload {local}", "it does not exist", "", "check the path")
        for below in files_under(local):
            self._backend.put_file(self._key(*parts, *below), local.joinpath(*below))

    def download(self, local: Path, *parts: str) -> Path:
        """Copy a file, or a folder file by file, to `local`. Each file becomes visible whole. Returns `local`."""
        children = self.children(*parts)
        if not children:
            self._backend.get_file(self._key(*parts), local)
        for name, size in sorted(children.items()):
            check_part(name)
            if size is None:
                self.download(local / name, *parts, name)
            else:
                self._backend.get_file(self.path(*parts, name), local / name)
        return local

    def download_file(self, local: Path, *parts: str) -> None:
        """Copy one file to `local`, streamed; it becomes visible whole."""
        self._backend.get_file(self._key(*parts), local)

    def local_dir(self, *parts: str) -> Path:
        """Folder on this machine that mirrors the key: the key itself for local roots, a cache folder for S3."""
        if self.is_local:
            return Path(self.path(*parts))
        self.path(*parts)
        identity = hashlib.sha256(f"{endpoint()} {self.uri}".encode()).hexdigest()[:16]
        return cache_root().joinpath("s3", identity, *parts)

    def _key(self, *parts: str) -> str:
        assert parts, f"the root {self.uri} is no key"
        return self.path(*parts)


@dataclass(frozen=True)
class RunPaths:
    """Keys of one run: `runs/<name>-<digest[:8]>/...`. `digest` is the spec's digest."""

    store: Store
    name: str
    digest: str
    inside: tuple[str, ...] = ()
    """Folder in the run's, for a part of it that is a run itself."""

    @property
    def run_id(self) -> str:
        """Folder name of the run."""
        return f"{self.name}-{self.digest[:8]}"

    def file(self, *parts: str) -> tuple[str, ...]:
        """Key of any file of the run; without parts, of its folder."""
        return ("runs", self.run_id, *self.inside, *parts)

    def part(self, *names: str) -> "RunPaths":
        """A run in a folder of this one."""
        return RunPaths(self.store, self.name, self.digest, (*self.inside, *names))

    def patiently(self, patience_s: float) -> "RunPaths":
        """The same run on a store that waits out an outage."""
        return RunPaths(self.store.with_retries(patience_s), self.name, self.digest, self.inside)

    def spec(self) -> tuple[str, ...]:
        """The resolved spec."""
        return self.file("spec.yaml")

    def plan(self) -> tuple[str, ...]:
        """Path of the prediction that was made at the start."""
        return self.file("plan.json")

    def provenance(self) -> tuple[str, ...]:
        """Facts that `environment.collect` found at the start."""
        return self.file("provenance.json")

    def metrics(self) -> tuple[str, ...]:
        """One JSON line a logged step."""
        return self.file("metrics.jsonl")

    def status(self) -> tuple[str, ...]:
        """State of the run, replaced atomically."""
        return self.file("status.json")

    def checkpoints(self, *parts: str) -> tuple[str, ...]:
        """Folder of the checkpoints, or a key in it."""
        return self.file("checkpoints", *parts)


def json_bytes(value: object) -> bytes:
    """Indented JSON with a closing newline: the form of every JSON file that a person may `cat`."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def cache_root() -> Path:
    """Folder of what can be fetched or computed again: `$GRAFTWORK_CACHE` or `~/.cache/graftwork`."""
    return Path(os.environ.get("GRAFTWORK_CACHE") or "~/.cache/graftwork").expanduser().absolute()


def open_uri(uri: str) -> tuple[Store, str]:
    """Store of the parent and the key of a file given as a plain path, `file://` or `s3://`."""
    whole = _normalise(uri)
    parent, _, key = whole.rpartition("/")
    if not key or parent in ("s3:/", "s3:"):
        raise ConfigError(f"uri {uri}", "it names no file", "a data URI is a path, file:///PATH or s3://BUCKET/KEY")
    return Store(parent or "/"), key


def read_uri(uri: str) -> bytes:
    """Whole content of a file given as a plain path, `file://` or `s3://`."""
    store, key = open_uri(uri)
    return store.read_bytes(key)


def check_part(part: str) -> None:
    """Raise StorageError unless `part` is one plain name: no separator, no `..`, no control character."""
    bad = (
        part in ("", ".", "..")
        or part.startswith(TMP_PREFIX)
        or any(char in "/\\" or not char.isprintable() for char in part)
        or len(part.encode(errors="replace")) > _MAX_PART_BYTES
    )
    if bad:
        raise StorageError(
            f"path part {part[:80]!r}",
            "it is no plain name",
            "a part is one file or folder name without '/', '\\', '..' or control characters",
        )


def _normalise(uri: str) -> str:
    """Absolute path of a local URI, `s3://bucket/prefix` without a trailing slash otherwise."""
    path = uri
    if match := _SCHEME.match(uri):
        scheme, parts = match[1].lower(), urlsplit(uri)
        if "@" in parts.netloc or ":" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError(
                f"uri {scheme}://***",
                "it carries credentials or parameters (hidden here)",
                "a URI names a place and nothing else",
                "credentials go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the endpoint into AWS_ENDPOINT_URL",
            )
        if scheme == "s3" and _BUCKET.fullmatch(parts.netloc):
            prefix = parts.path.removeprefix("/").rstrip("/")
            names = prefix.split("/") if prefix else []
            if not any(name in ("", ".", "..") for name in names):
                return "/".join([f"s3://{parts.netloc}", *names])
        if scheme != "file" or parts.netloc not in ("", "localhost"):
            raise ConfigError(f"uri {uri}", "it names no place that can be read here", _FORMS)
        path = unquote(parts.path)
    if not path or "\0" in path or _ALMOST_URI.match(path):
        raise ConfigError(f"uri {path!r}", "it is neither a path nor a whole URI", _FORMS)
    return os.path.abspath(os.path.expanduser(path))
