"""This code as a wheel whose name says its content: the same sources give the same bytes on every machine."""

import base64
import functools
import hashlib
import io
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import graftwork
from graftwork.cluster.shipping import copy_package
from graftwork.storage import Store

DIST = "graftwork"
CODE = "code"
"""Folder of the wheels in a run store."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip can hold: the build's time is no content."""


def build_wheel() -> tuple[str, bytes]:
    """`graftwork-<version>+<12 of its sha256>-py3-none-any.whl` and its bytes. `pip install --no-deps` takes it."""
    with tempfile.TemporaryDirectory(prefix="gw-wheel-") as name:
        copy_package(Path(name) / DIST)
        files = {str(path.relative_to(name)): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
    version = f"{graftwork.__version__}+{content_digest(files)}"
    info = f"{DIST}-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {DIST}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: graftwork\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\ngraftwork = graftwork.cli:main\n"
    files[f"{info}/RECORD"] = _record(files, info)
    return f"{DIST}-{version}-py3-none-any.whl", zipped(files)


def wheel_uri(store: Store) -> str:
    """Where the wheel of this code lies, or would: `<root>/code/<name>`."""
    return store.path(CODE, _built()[0])


def publish_wheel(store: Store) -> str:
    """Put the wheel of this code there, once: its name says its content. Its URI. Raises StorageError."""
    name, wheel = _built()
    store.create_bytes(wheel, CODE, name)
    return store.path(CODE, name)


@functools.cache
def _built() -> tuple[str, bytes]:
    return build_wheel()


def content_digest(files: Mapping[str, bytes]) -> str:
    """12 hex of the sha256 over the files and their paths, dist-info left out."""
    content = hashlib.sha256()
    for path in sorted(files):
        content.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
    return content.hexdigest()[:12]


def _record(files: dict[str, bytes], info: str) -> bytes:
    rows = [f"{path},sha256={_hash(files[path])},{len(files[path])}" for path in sorted(files)]
    return "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip whose bytes depend on the files alone."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[path])
    return whole.getvalue()


if __name__ == "__main__":  # python -m graftwork.cluster.wheel FOLDER
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    name, whole = build_wheel()
    (folder / name).write_bytes(whole)
    print(folder / name)
