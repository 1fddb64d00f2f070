"""One process a run: a lock that dies with its owner.

On a disk it is an flock, which the kernel drops with the process. On S3 it is an object made by a conditional put and
renewed every few seconds; one that was not renewed for a while belongs to a dead owner and is taken over.
"""

import contextlib
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator

from graftwork.errors import RunError
from graftwork.storage import RunPaths

LOCK = "lock"
RENEW_S = 5.0
DEAD_AFTER_S = 30.0


@contextlib.contextmanager
def run_lock(run: RunPaths) -> Iterator[None]:
    """Own the run for the block. Raises RunError when another living process owns it."""
    with _disk_lock(run) if run.store.is_local else _object_lock(run):
        yield


@contextlib.contextmanager
def _disk_lock(run: RunPaths) -> Iterator[None]:
    folder = run.store.local_dir(*run.file())
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(run, os.pread(handle, 100, 0).decode().strip()) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _object_lock(run: RunPaths) -> Iterator[None]:
    key, owner, done = run.file(LOCK), secrets.token_hex(8), threading.Event()
    if not run.store.create_bytes(_lease(owner), *key):
        held = run.store.read_json(*key)
        if time.time() - held["renewed_at"] < DEAD_AFTER_S:
            raise _taken(run, f"renewed {time.time() - held['renewed_at']:.0f} s ago")
        run.store.delete(*key)
        if not run.store.create_bytes(_lease(owner), *key):
            raise _taken(run, "just taken over")

    def renew() -> None:
        while not done.wait(RENEW_S):
            run.store.write_bytes(_lease(owner), *key)

    thread = threading.Thread(target=renew, name="run-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        run.store.delete(*key)


def _lease(owner: str) -> bytes:
    return json.dumps({"owner": owner, "renewed_at": time.time()}).encode()


def _taken(run: RunPaths, by: str) -> RunError:
    return RunError(
        f"run {run.run_id}",
        f"another process is running it ({by})",
        "one process a run",
        "wait for it, or end it: the same command then continues from the last checkpoint",
    )
