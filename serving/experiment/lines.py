"""Records as they come, one JSON line each: what a crash tore is cut off, and its question is asked again."""

import os
from pathlib import Path

from pydantic import BaseModel

from graftwork.errors import StorageError


def read_whole_lines(path: Path) -> list[bytes]:
    """The lines that were written whole; a torn last one is cut off the file."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content[:whole].splitlines()


def append_line(path: Path, record: BaseModel) -> None:
    """One line, written by one call, so that a reader and a second writer see it whole. Raises StorageError."""
    line = record.model_dump_json().encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            file.write(line)
    except OSError as error:
        raise StorageError(f"answers {path}", f"cannot be written ({error.strerror})", "",
                           "free space or choose another root; the rerun continues") from error  # fmt: skip
