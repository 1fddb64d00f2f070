"""Files on a disk that this machine mounts. Every write is staged next to its target, synced, then renamed."""

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graftwork.errors import StorageError

TMP_PREFIX = ".tmp-"
"""Staged files; never listed, never copied. A killed writer leaves one behind, and nothing else."""

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
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
        with _as_storage_errors("write", path), _staged(path) as tmp:
            _write_synced(tmp, data)
            os.replace(tmp, path)
            _sync_folder(path)

    def create(self, path: str, data: bytes) -> bool:
        """A hard link is the one call that both fails on an existing name and shows only whole content."""
        with _as_storage_errors("create", path), _staged(path) as tmp:
            _write_synced(tmp, data)
            try:
                os.link(tmp, path)
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
            _sync_folder(path)
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
            try:
                with os.scandir(path) as entries:
                    found = [entry for entry in entries if not entry.name.startswith(TMP_PREFIX)]
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return {entry.name: size for entry in found if (size := _size(entry)) != -1}

    def stamps(self, path: str) -> dict[str, str]:
        with _as_storage_errors("list", path):
            found = {name: os.stat(f"{path}/{name}") for name, size in self.children(path).items() if size is not None}
        return {name: _stamp(stat) for name, stat in found.items()}

    def tree(self, path: str) -> dict[tuple[str, ...], str]:
        found: dict[tuple[str, ...], str] = {}
        with _as_storage_errors("list", path):
            _add_files(path, (), found)
        return found

    def ages(self, path: str) -> dict[tuple[str, ...], float]:
        """Its clock is the time that it gives to a new file: on a share that is the server's, not this machine's."""
        found: dict[tuple[str, ...], float] = {}
        with _as_storage_errors("list", path):
            if os.path.isdir(path):
                _add_times(path, (), found)
                now = _time_of_disk(path)
                return {name: max(now - written, 0.0) for name, written in found.items()}
        return found

    def delete(self, path: str) -> None:
        """Moved out of sight in one step, then removed: no reader meets half a folder."""
        with _as_storage_errors("delete", path):
            gone = _tmp_beside(path)
            try:
                os.rename(path, gone)
            except (FileNotFoundError, NotADirectoryError):
                return
            if os.path.isdir(gone) and not os.path.islink(gone):
                shutil.rmtree(gone)
            else:
                os.unlink(gone)

    def put_file(self, local: Path, path: str) -> None:
        copy_file(local, path)

    def get_file(self, path: str, local: Path) -> None:
        copy_file(Path(path), str(local))


def copy_file(source: Path, target: str) -> None:
    """Copy one file so that `target` is absent, old, or whole at every moment. StorageError otherwise."""
    with _as_storage_errors("copy to", target), _staged(target) as tmp:
        shutil.copyfile(source, tmp)
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(tmp, target)
        _sync_folder(target)


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


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _add_files(folder: str, above: tuple[str, ...], found: dict[tuple[str, ...], str]) -> None:
    """Every file below, with a stamp. The inode tells files apart that replaced each other within a clock tick."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TMP_PREFIX):
                continue
            with suppress(FileNotFoundError):  # deleted since it was listed
                if entry.is_dir():
                    _add_files(entry.path, (*above, entry.name), found)
                else:
                    stat = entry.stat()
                    found[*above, entry.name] = f"{stat.st_ino} {_stamp(stat)}"


def _add_times(folder: str, above: tuple[str, ...], found: dict[tuple[str, ...], float]) -> None:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TMP_PREFIX):
                continue
            with suppress(FileNotFoundError):  # replaced or deleted since it was listed
                if entry.is_dir():
                    _add_times(entry.path, (*above, entry.name), found)
                else:
                    found[*above, entry.name] = entry.stat().st_mtime


def _time_of_disk(folder: str) -> float:
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=TMP_PREFIX) as new:
            return os.fstat(new.fileno()).st_mtime
    except OSError:  # it may be read only
        return time.time()


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file, None for a folder, -1 for what was deleted since it was listed."""
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except FileNotFoundError:
        return -1


@contextmanager
def _staged(path: str) -> Iterator[str]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tmp = _tmp_beside(path)
    try:
        yield tmp
    finally:
        Path(tmp).unlink(missing_ok=True)


def _tmp_beside(path: str) -> str:
    return os.path.join(os.path.dirname(path), f"{TMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}")


def _write_synced(path: str, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    """Make the rename itself durable."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _as_storage_errors(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found, hint = _explain(error, path)
        raise StorageError(f"{action} {path}", found, "", hint) from error


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
