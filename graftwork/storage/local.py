"""Files on a disk that this machine mounts. Every write is staged next to its target, synced, then renamed.

`build_once` fills the folders of the cache in the same way: one process builds, and the folder appears whole.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR

from graftwork.errors import StorageError

TMP_PREFIX = ".tmp-"
"""Staged files; never listed, never copied. A killed writer leaves one behind, and nothing else."""

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Progress = Callable[[str, float], None]
"""Called with (what is being done, share done in 0..1)."""
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalFiles:
    """A disk. Paths are absolute; every failure is a StorageError."""

    def read(self, path: str) -> bytes | None:
        with _as_storage_errors("read", path):
            try:
                return Path(path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, path: str, data: bytes) -> None:
        with _stage_file("write", path, data) as staged:
            os.replace(staged, path)

    def create(self, path: str, data: bytes) -> bool:
        """A hard link is the one call that both fails on an existing name and shows only whole content."""
        with _stage_file("create", path, data) as staged:
            try:
                os.link(staged, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StorageError(
                    f"create {path}",
                    f"the filesystem has no hard links ({error.strerror})",
                    "publishing needs a create that fails when the file exists",
                    "set root: to a folder on another filesystem, or to s3://BUCKET/PREFIX",
                ) from error
        return True

    def append(self, path: str, line: bytes) -> None:
        with _as_storage_errors("append to", path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # a line that crosses a page grows the file in two steps
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a killed writer left half a line: keep ours whole
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)

    def exists(self, path: str) -> bool:
        with _as_storage_errors("look for", path):
            try:
                os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def children(self, path: str) -> dict[str, int | None]:
        with _as_storage_errors("list", path):
            return {name: None if S_ISDIR(stat.st_mode) else stat.st_size for name, stat in _entries(path)}

    def stamps(self, path: str) -> dict[str, str]:
        with _as_storage_errors("list", path):
            files = [(name, stat) for name, stat in _entries(path) if not S_ISDIR(stat.st_mode)]
        return {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in files}

    def tree(self, path: str) -> dict[tuple[str, ...], str]:
        """The inode tells files apart that replaced each other within a clock tick."""
        with _as_storage_errors("list", path):
            return {at: f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for at, stat in _walk_files(path)}

    def ages(self, path: str) -> dict[tuple[str, ...], float]:
        """Its clock is the time that it gives to a new file: on a share that is the server's, not this machine's."""
        with _as_storage_errors("list", path):
            if not os.path.isdir(path):
                return {}
            written = {at: stat.st_mtime for at, stat in _walk_files(path)}
            try:
                with tempfile.TemporaryFile(dir=path, prefix=TMP_PREFIX) as new:
                    now = os.fstat(new.fileno()).st_mtime
            except OSError:  # it may be read only
                now = time.time()
            return {at: max(now - at_s, 0.0) for at, at_s in written.items()}

    def delete(self, path: str) -> None:
        """Moved out of sight in one step, then removed: no reader meets half a folder."""
        with _as_storage_errors("delete", path):
            gone = os.path.join(os.path.dirname(path), tmp_name())
            try:
                os.rename(path, gone)
            except (FileNotFoundError, NotADirectoryError):
                return
            if os.path.isdir(gone) and not os.path.islink(gone):
                shutil.rmtree(gone)
            else:
                os.unlink(gone)

    def put_file(self, path: str, local: Path) -> None:
        with _stage_file("copy to", path, local) as staged:
            os.replace(staged, path)

    def get_file(self, path: str, local: Path) -> None:
        self.put_file(str(local), Path(path))


def tmp_name() -> str:
    """A new name for a staged file."""
    return f"{TMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"


def files_under(folder: Path) -> Iterator[tuple[str, ...]]:
    """Parts of every file below `folder`, sorted. A linked folder is refused: it would be skipped unseen."""
    for base, folders, names in os.walk(folder):
        for name in folders:
            if os.path.islink(os.path.join(base, name)):
                raise StorageError(
                    f"copy {folder}",
                    f"{os.path.join(base, name)} is a link to a folder",
                    "only files and plain folders are copied",
                    "replace the link by the folder",
                )
        folders.sort()
        for name in sorted(names):
            if not name.startswith(TMP_PREFIX):
                yield Path(base, name).relative_to(folder).parts


def file_sha256(path: Path) -> str:
    """sha256 hex of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(empty folder)` if it is absent: one process builds, the others wait.

    A build that raises leaves nothing behind. The files are synced before the folder gets its name, so a crash or a
    power cut cannot leave a torn one.
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
            for path in unfinished.rglob("*"):
                if path.is_file():
                    with path.open("rb") as handle:
                        os.fsync(handle.fileno())
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


def _entries(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Name and facts of each child; one that is deleted during the listing is left out."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(TMP_PREFIX):
                with suppress(FileNotFoundError):
                    yield entry.name, entry.stat()


def _walk_files(folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
    """Parts and facts of every file below a folder."""
    for name, stat in _entries(folder):
        if S_ISDIR(stat.st_mode):
            yield from _walk_files(os.path.join(folder, name), (*above, name))
        else:
            yield (*above, name), stat


@contextmanager
def _stage_file(action: str, path: str, content: bytes | Path) -> Iterator[str]:
    """Write a synced file next to `path`, which the block gives its name; then make the new name durable."""
    folder = os.path.dirname(path)
    with _as_storage_errors(action, path):
        os.makedirs(folder, exist_ok=True)
        staged = os.path.join(folder, tmp_name())
        try:
            if isinstance(content, Path):
                shutil.copyfile(content, staged)
            with open(staged, "xb" if isinstance(content, bytes) else "rb+") as file:
                if isinstance(content, bytes):
                    file.write(content)
                    file.flush()
                os.fsync(file.fileno())
            yield staged
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        finally:
            Path(staged).unlink(missing_ok=True)


@contextmanager
def _as_storage_errors(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem, hint = _explain(error, path)
        raise StorageError(f"{action} {path}", problem, "", hint) from error


def _explain(error: OSError, path: str) -> tuple[str, str]:
    if error.errno in FULL_DISK:
        return f"no space ({error.strerror})", f"free space on the disk of {path}, or set another root:"
    if isinstance(error, FileNotFoundError):
        return "it does not exist", "check the path"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return (
            f"not allowed ({error.strerror})",
            f"give your user write and read rights on {path}, or set another root:",
        )
    if isinstance(error, IsADirectoryError):
        return "it is a folder", "name a file"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"a file is in the place of a folder ({error.filename})", "move that file away, or set another root:"
    return str(error.strerror or error), "check the path and the disk"
