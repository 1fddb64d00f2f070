"""Folders of the cache, built once: one process builds, the others wait, and the folder appears whole."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str, float], None]
"""Called with (what is being done, share done in 0..1)."""


def file_sha256(path: Path) -> str:
    """sha256 hex of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(empty folder)` if it is absent. A build that raises leaves nothing behind.

    The files are synced before the folder gets its name, so a crash or a power cut cannot leave a torn one.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        unfinished = folder.parent / f".tmp-{folder.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            build(unfinished)
            _sync(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` among the processes of this machine; freed when its holder dies."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
