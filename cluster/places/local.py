"""This machine as a place: a driver in the background, with a private Ray of its own."""

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from graftwork.cluster.backend import Attempt, Finding, Job
from graftwork.cluster.place import Seen
from graftwork.errors import ClusterError
from graftwork.storage import Store, cache_root

UP_S = 30.0
END_S = 5.0


class LocalPlace:
    """A driver holds the lock of its attempt for its life: whether one runs is whether the lock is held."""

    on = "local"

    def __init__(self, root: str) -> None:
        store = Store(root)
        self._root = store.uri
        self._folder = cache_root() / "jobs" / hashlib.sha256(store.uri.encode()).hexdigest()[:16]

    def check(self, job: Job) -> list[Finding]:
        """Nothing keeps a job from this machine but what its plan says."""
        return []

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """None."""
        return []

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """None."""
        return []

    def doctor(self) -> list[Finding]:
        """Nothing is looked at yet."""
        return []

    def start(self, attempt: Attempt) -> None:
        """Start the driver unless one runs; returns once it holds its lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._only_one(attempt.id):
            if self._pid(attempt.id) is not None:
                return
            command = [sys.executable, "-m", "graftwork.cluster.places.local", str(self._lock(attempt.id)), self._root,
                       attempt.job.job_id, str(attempt.number)]  # fmt: skip
            with open(self._folder / f"{attempt.id}.log", "ab") as log:
                driver = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            end = time.monotonic() + UP_S
            while self._pid(attempt.id) is None and driver.poll() is None:
                if time.monotonic() > end:
                    raise ClusterError("--on local", f"the driver did not start within {UP_S:.0f} s", "",
                                       f"look at {log.name}")  # fmt: skip
                time.sleep(0.02)

    def observe(self, attempt_ids: Collection[str]) -> dict[str, Seen]:
        """RUNNING for those whose driver lives here."""
        return {name: Seen("RUNNING") for name in attempt_ids if self._pid(name) is not None}

    def stop(self, attempt_id: str) -> None:
        """End the driver and everything below it."""
        pid = self._pid(attempt_id)
        if pid is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            driver = psutil.Process(pid)
            below = driver.children(recursive=True)
            driver.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs([driver, *below], timeout=END_S)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=END_S)

    def _lock(self, attempt_id: str) -> Path:
        return self._folder / f"{attempt_id}.lock"

    def _pid(self, attempt_id: str) -> int | None:
        """Of the driver that holds the attempt's lock; None where none does."""
        try:
            handle = os.open(self._lock(attempt_id), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            written = os.pread(handle, 20, 0)
            return int(written) if written else None
        finally:
            os.close(handle)
        return None

    @contextlib.contextmanager
    def _only_one(self, attempt_id: str) -> Iterator[None]:
        """Of all clients that start an attempt, one at a time."""
        handle = os.open(self._folder / f"{attempt_id}.starting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _main() -> int:
    from graftwork.cluster.driver.run import drive

    lock, root, job_id, number = sys.argv[1:]
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return drive(root, job_id, int(number), "local")


if __name__ == "__main__":
    sys.exit(_main())
