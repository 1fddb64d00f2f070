"""Packaging of this code as a wheel named by its content: the same sources give the same bytes on every machine."""

import base64
import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import graftwork
from graftwork.errors import ConfigError, StorageError
from graftwork.storage.store import Store

# This code as a folder that Ray can send to a cluster: `graftwork` with its four linked folders made real.


LINKED = ("cluster", "training", "tuning", "serving")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


@contextlib.contextmanager
def shipped(files: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder with the package and `files`, each at its path relative to the current folder. Removed afterwards.

    Ray sends it as working_dir: it leads sys.path of the job's driver and of all its workers.
    """
    with tempfile.TemporaryDirectory(prefix="gw-ship-") as name:
        folder = Path(name)
        copy_package(folder / "graftwork")
        for file in files:
            target = folder / relative(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        yield folder


def copy_package(target: Path) -> None:
    """Copy the package that this process runs, wherever its four folders are."""
    source = Path(graftwork.__file__).parent

    def ignored(at: str, names: list[str]) -> set[str]:
        return {*_LEFT_OUT(at, names), *(LINKED if Path(at) == source else ())}

    shutil.copytree(source, target, ignore=ignored)
    for name in LINKED:
        found = next(Path(part) / name for part in graftwork.__path__ if (Path(part) / name).is_dir())
        shutil.copytree(found.resolve(), target / name, ignore=_LEFT_OUT)


def relative(file: Path) -> Path:
    """Path of a shipped file in the job's folder. Raises ConfigError for one outside the current folder."""
    try:
        return Path(os.path.relpath(file)) if ".." not in Path(os.path.relpath(file)).parts else Path(file.name)
    except ValueError:  # another drive
        raise ConfigError(f"file {file}", "it is on another drive", "shipped files are under this folder") from None


# `python -m graftwork.cluster.jobs.packaging unpack WHEEL_URI FOLDER`: put this code into a pod, before Ray starts.
#
# The wheel's name has the hash of its content, which is checked. No pip, no index, no network beyond the store.


PATIENCE_S = 120.0
_DIGEST = re.compile(r"\+([0-9a-f]{12})-py3-none-any\.whl$")


def unpack(uri: str, folder: Path) -> None:
    """Fetch the wheel and lay its files out in `folder`. Raises StorageError where its content has another hash."""
    root, _, name = uri.rpartition("/")
    data = Store(root, PATIENCE_S).read_bytes(name)
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        files = {entry: wheel.read(entry) for entry in wheel.namelist() if ".dist-info/" not in entry}
        found, named = content_digest(files), _DIGEST.search(name)
        if named is None or named[1] != found:
            raise StorageError(
                f"wheel {uri}",
                f"its content is {found}",
                "a wheel's name ends with the hash of its content",
                "submit the job again: the right one is written then",
            )
        wheel.extractall(folder)


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
    """Return the URI of this code's wheel in a store: `<root>/code/<name>`."""
    return store.path(CODE, _build_once()[0])


def publish_wheel(store: Store) -> str:
    """Put the wheel of this code into a store, once, and return its URI. Raises StorageError."""
    name, wheel = _build_once()
    store.create_bytes(wheel, CODE, name)
    return store.path(CODE, name)


@functools.cache
def _build_once() -> tuple[str, bytes]:
    return build_wheel()


def content_digest(files: Mapping[str, bytes]) -> str:
    """12 hex of the sha256 over the files and their paths, dist-info left out."""
    content = hashlib.sha256()
    for path in sorted(files):
        content.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
    return content.hexdigest()[:12]


def _record(files: dict[str, bytes], info: str) -> bytes:
    hashes = {
        path: base64.urlsafe_b64encode(hashlib.sha256(files[path]).digest()).rstrip(b"=").decode() for path in files
    }
    rows = [f"{path},sha256={hashes[path]},{len(files[path])}" for path in sorted(files)]
    return "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip whose bytes depend on the files alone."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[path])
    return whole.getvalue()


def main(verb: str, *arguments: str) -> None:
    """Run `python -m graftwork.cluster.jobs.packaging wheel FOLDER` or `... unpack WHEEL_URI FOLDER`."""
    if verb == "unpack":
        uri, folder = arguments
        unpack(uri, Path(folder))
        return
    target = Path(arguments[0])
    target.mkdir(parents=True, exist_ok=True)
    name, content = build_wheel()
    (target / name).write_bytes(content)
    print(target / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
