"""One process a run: a lock that dies with its owner.

On a disk it is an flock, which the kernel drops with the process. On S3 it is an object made by a conditional put and
renewed every few seconds; one that was not renewed for a while belongs to a dead owner and is taken over, at once where
the owner was a process of this machine.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from graftwork.errors import RunError, StoreUnreachable
from graftwork.storage.store import RunPaths

LOCK = "lock"
RENEW_S = 5.0
DEAD_AFTER_S = 30.0
OVERTAKES_S = 60.0
"""Seconds that the next attempt of a job waits for the fenced one before it to release the run."""


@contextlib.contextmanager
def run_lock(run: RunPaths, wait_s: float = 0.0) -> Iterator[None]:
    """Own the run for the block. Raises RunError when another living process owns it, for longer than `wait_s`."""
    with contextlib.ExitStack() as held:
        end = time.monotonic() + wait_s
        while True:
            try:
                held.enter_context(_disk_lock(run) if run.store.is_local else _object_lock(run))
                break
            except RunError:
                if time.monotonic() > end:
                    raise
            time.sleep(1.0)
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
            raise _lock_error(run, os.pread(handle, 100, 0).decode().strip()) from None
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
        if time.time() - held["renewed_at"] < DEAD_AFTER_S and not _is_dead_here(held):
            raise _lock_error(run, f"renewed {time.time() - held['renewed_at']:.0f} s ago")
        run.store.delete(*key)
        if not run.store.create_bytes(_lease(owner), *key):
            raise _lock_error(run, "just taken over")

    def renew() -> None:
        while not done.wait(RENEW_S):
            with contextlib.suppress(StoreUnreachable):  # an outage: no other process can take it over either
                if run.store.read_json(*key)["owner"] == owner:
                    run.store.write_bytes(_lease(owner), *key)

    thread = threading.Thread(target=renew, name="run-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(StoreUnreachable):  # it runs out by itself
            run.store.delete(*key)


def _lease(owner: str) -> bytes:
    process = {"machine": _machine(), "process": os.getpid(), "began": psutil.Process().create_time()}
    return json.dumps({"owner": owner, "renewed_at": time.time(), **process}).encode()


def _is_dead_here(held: Mapping[str, Any]) -> bool:
    """The owner was a process of this machine and is no more. A process id is used again, its start is another then."""
    if held.get("machine") != _machine():
        return False
    try:
        return bool(psutil.Process(held["process"]).create_time() != held["began"])
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """This machine since its last boot, as far as its process ids reach: each container counts as one."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return " ".join([socket.gethostname(), *([boot.read_text().strip(), os.readlink(space)] if space.exists() else [])])


def _lock_error(run: RunPaths, by: str) -> RunError:
    return RunError(
        f"run {run.run_id}",
        f"another process is running it ({by})",
        "one process a run",
        "wait for it, or end it: the same command then continues from the last checkpoint",
    )
