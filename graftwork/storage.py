"""Where runs, adapters, aliases, data and caches live: the only place that joins a path or opens a filesystem.

A `Store` is one root: a folder, `file://` or `s3://` (through s3fs). Keys are given as parts, one name each, never as a
joined string. Credentials come from the environment alone (`AWS_*`); a URI that carries them is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_ROOT = ".graftwork"
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""A task, a run, an alias, a version."""
ALIAS_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}@[a-z0-9][a-z0-9._-]{0,62}$"
"""`task@alias` or `task@version`."""


class Store:
    """One root. Cheap to build and to pickle: nothing is opened before the first read or write."""

    def __init__(self, root: str) -> None:
        self.uri = os.path.abspath(root)
        self.is_local = True

    def path(self, *parts: str) -> str:
        """Full path (local) or `s3://` URI of a key."""
        raise NotImplementedError

    def read_bytes(self, *parts: str) -> bytes:
        """Whole content. StorageError when it is missing or out of reach."""
        raise NotImplementedError

    def read_text(self, *parts: str) -> str:
        """Whole content as UTF-8. StorageError as in `read_bytes`, or when it is not UTF-8."""
        raise NotImplementedError

    def read_json(self, *parts: str) -> Any:
        """Parsed JSON. StorageError as in `read_bytes`, or when it is not JSON."""
        raise NotImplementedError

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Replace the key atomically: readers see the old content or the new, whole."""
        raise NotImplementedError

    def write_json(self, value: object, *parts: str) -> None:
        """`write_bytes` of indented JSON."""
        raise NotImplementedError

    def create_bytes(self, data: bytes, *parts: str) -> bool:
        """Write only where the key is absent. True for the one process that created it, False for all others."""
        raise NotImplementedError

    def append_jsonl(self, record: Mapping[str, object], *parts: str) -> None:
        """Append one JSON line (local roots only; objects on S3 cannot grow, so write them whole)."""
        raise NotImplementedError

    def exists(self, *parts: str) -> bool:
        """Whether a file or a folder stands there."""
        raise NotImplementedError

    def list(self, *parts: str) -> list[str]:
        """Names of the children, sorted; empty when there is no such folder. Unfinished writes are not shown."""
        raise NotImplementedError

    def sizes(self, *parts: str) -> dict[str, int]:
        """Files right under a folder with their size in bytes."""
        raise NotImplementedError

    def delete(self, *parts: str) -> None:
        """Remove a file or a folder with all in it; nothing happens when it is absent."""
        raise NotImplementedError

    def upload(self, local: Path, *parts: str) -> None:
        """Copy a local file, or a folder file by file, to the key. Each file becomes visible whole."""
        raise NotImplementedError

    def download(self, local: Path, *parts: str) -> Path:
        """Copy a file, or a folder file by file, to `local`. Each file becomes visible whole."""
        raise NotImplementedError

    def local_dir(self, *parts: str) -> Path:
        """Folder on this machine that mirrors the key: the key itself for local roots, a cache folder for S3."""
        raise NotImplementedError


@dataclass(frozen=True)
class RunPaths:
    """Keys of one run: `runs/<name>-<digest[:8]>/...`. `digest` is the spec's digest."""

    store: Store
    name: str
    digest: str

    @property
    def run_id(self) -> str:
        """Folder name of the run."""
        return f"{self.name}-{self.digest[:8]}"

    def file(self, *parts: str) -> tuple[str, ...]:
        """Key of any file of the run; without parts, of its folder."""
        return ("runs", self.run_id, *parts)

    def spec(self) -> tuple[str, ...]:
        """The resolved spec."""
        return self.file("spec.yaml")

    def provenance(self) -> tuple[str, ...]:
        """What `provenance.collect` found at the start."""
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


def cache_root() -> Path:
    """Folder of what can be fetched or computed again: `$GRAFTWORK_CACHE` or `~/.cache/graftwork`."""
    return Path(os.environ.get("GRAFTWORK_CACHE") or "~/.cache/graftwork").expanduser().absolute()


def open_uri(uri: str) -> tuple[Store, str]:
    """Store of the parent and the key of a file given as a plain path, `file://` or `s3://`."""
    raise NotImplementedError


def read_uri(uri: str) -> bytes:
    """Whole content of a file given as a plain path, `file://` or `s3://`."""
    raise NotImplementedError
