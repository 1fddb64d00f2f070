"""This code as a folder that Ray can send to a cluster: `graftwork` with its four linked folders made real."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import graftwork
from graftwork.errors import ConfigError

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
    """Copy the package that this process runs, wherever its four folders lie."""
    source = Path(graftwork.__file__).parent
    shutil.copytree(source, target, ignore=lambda at, names: {*_LEFT_OUT(at, names), *_linked(at, source)})
    for name in LINKED:
        found = next(Path(part) / name for part in graftwork.__path__ if (Path(part) / name).is_dir())
        shutil.copytree(found.resolve(), target / name, ignore=_LEFT_OUT)


def relative(file: Path) -> Path:
    """Path of a shipped file in the job's folder. Raises ConfigError for one outside the current folder."""
    try:
        return Path(os.path.relpath(file)) if ".." not in Path(os.path.relpath(file)).parts else Path(file.name)
    except ValueError:  # another drive
        raise ConfigError(f"file {file}", "it lies on another drive", "shipped files lie under this folder") from None


def _linked(at: str, source: Path) -> set[str]:
    return set(LINKED) if Path(at) == source else set()
