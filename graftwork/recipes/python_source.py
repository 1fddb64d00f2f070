"""The running Python's own standard library as a source of text: there wherever Graftwork runs."""

import functools
import hashlib
import json
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PythonSource:
    """Files of the standard library by globs under its folder, private modules (`_name.py`) left out."""

    patterns: tuple[str, ...]
    most_bytes: int = 1 << 20
    """Larger files are left out."""

    def __str__(self) -> str:
        return f"python://{platform.python_version()}/{','.join(self.patterns)}"

    @property
    def sha256(self) -> str:
        """Of the contents: another patch release is another source."""
        return hashlib.sha256(self.read()).hexdigest()

    def read(self) -> bytes:
        """JSON: path -> text, by path."""
        return _read(self.patterns, self.most_bytes)


@functools.cache
def _read(patterns: tuple[str, ...], most_bytes: int) -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    found = {path for pattern in patterns for path in root.glob(pattern)}
    files = sorted(path for path in found if not path.name.startswith("_") and path.stat().st_size <= most_bytes)
    return json.dumps({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}).encode()
