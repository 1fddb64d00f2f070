"""Local target: a driver in the background of this machine, with a private Ray of its own."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from graftwork.cluster.jobs.checks import gpu_memory_findings, gpu_share_findings, secret_findings
from graftwork.cluster.jobs.fencing import ENVIRONMENT
from graftwork.cluster.jobs.models import (
    Attempt,
    Demand,
    Finding,
    Findings,
    Job,
    ObservedState,
    TargetMachines,
    refuse,
    warn,
)
from graftwork.cluster.jobs.supervisor import end_all
from graftwork.cluster.private_ray import DIR_PREFIX, OBJECT_STORE_BYTES
from graftwork.cluster.spec import ClusterSpec
from graftwork.environment import available_memory, cores
from graftwork.errors import ClusterError, StorageError
from graftwork.planning.hardware import GIB, gpus_here
from graftwork.planning.memory import HEADROOM
from graftwork.storage.store import Store, cache_root

UP_S = 30.0
END_S = 5.0
LOCK_S = 1.0
TAIL_BYTES = 2000
SHM = Path("/dev/shm")
FULL_BYTES = 64 * 2**20
"""With less than this a disk counts as full: logs, spec and heartbeats would be lost."""
TIGHT_BYTES = GIB


class LocalTarget:
    """This machine. A driver has the lock of its attempt for its life, so the lock shows whether it runs.

    The locks are this machine's, whatever the root: a job that another machine runs for itself on a shared root is
    judged by its heartbeat alone.
    """

    on = "local"

    def __init__(self, root: str) -> None:
        store = Store(root)
        self._root = store.uri
        self._folder = cache_root() / "jobs" / hashlib.sha256(store.uri.encode()).hexdigest()[:16]

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        return machines_here()

    def check(self, job: Job) -> list[Finding]:
        """Whether the machine has what the workers ask for, and its folders take files."""
        return fit(job, self._root, self._folder)

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        return []

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        return []

    def doctor(self) -> list[Finding]:
        """Room in memory and on the disks, and what killed jobs left behind."""
        left: dict[str, list[int]] = {}  # processes of attempts whose driver is gone
        parents = {process.pid for process in psutil.Process().parents()}
        for process, attempt_id in self._job_processes():
            if self._pid(attempt_id) is None and process.pid not in parents:
                left.setdefault(attempt_id, []).append(process.pid)
        return health(self._root, self._folder, left)

    def start(self, attempt: Attempt) -> None:
        """Start the driver unless one runs; returns once it holds its lock."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            starting = self._folder / f"{attempt.id}.starting"
            with open(starting, "ab", opener=partial(os.open, mode=0o600)) as lock:  # one client at a time starts it
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._pid(attempt.id) is None:
                    self._launch_driver(attempt)
        except OSError as error:
            raise StorageError(
                f"start {attempt.id}",
                f"{error.filename or self._folder}: {error.strerror}",
                "the cache folder holds locks and logs of this machine's jobs",
                "free the disk, or set GRAFTWORK_CACHE to a folder that can be written",
            ) from error

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """RUNNING for those whose driver lives here, FAILED for those whose driver lived here."""
        found: dict[str, ObservedState] = {}
        for name in attempt_ids:
            if self._pid(name) is not None:
                found[name] = ObservedState("RUNNING")
            elif self._read_pid(name) is not None:
                found[name] = ObservedState("FAILED", message=_tail(self._folder / f"{name}.log"))
        return found

    def stop(self, attempt_id: str) -> None:
        """End the driver and everything that it started, also what left its session or outlived it."""
        pid = self._pid(attempt_id)
        with contextlib.suppress(psutil.NoSuchProcess):
            if pid is not None:
                driver = psutil.Process(pid)
                below = driver.children(recursive=True)
                driver.send_signal(signal.SIGTERM)
                psutil.wait_procs([driver, *below], timeout=END_S)
                end_all(lambda: [driver, *driver.children(recursive=True)])
                end_all(lambda: below)
        left = end_all(lambda: [process for process, name in self._job_processes() if name == attempt_id])
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise ClusterError(
                f"cancel {attempt_id}",
                f"processes {pids} do not end",
                "what waits for a device cannot be ended",
                "look at them with ps",
            )

    def _launch_driver(self, attempt: Attempt) -> None:
        arguments = [str(self._lock(attempt.id)), self._root, attempt.job.job_id, str(attempt.number)]
        command = [sys.executable, "-m", "graftwork.cluster.targets.local", *arguments]
        log = self._folder / f"{attempt.id}.log"
        self._lock(attempt.id).write_bytes(b"")  # the number of an earlier driver may be another process' by now
        with open(log, "ab") as out:
            driver = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        end = time.monotonic() + UP_S
        while self._pid(attempt.id) is None:
            if driver.poll() is not None:
                if self._read_pid(attempt.id) == driver.pid:  # it had its lock, and is through
                    return
                raise ClusterError(
                    f"start {attempt.id}",
                    f"its driver ended with {driver.returncode}: {_tail(log)}",
                    "the driver runs with this Python on this machine",
                    f"look at {log}",
                )
            if time.monotonic() > end:
                driver.kill()
                problem = f"its driver did not start within {UP_S:.0f} s: {_tail(log)}"
                raise ClusterError(f"start {attempt.id}", problem, "", f"look at the load of this machine and at {log}")
            time.sleep(0.02)

    def _job_processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """Processes that work for an attempt of this root, by the mark in their environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, json.JSONDecodeError, KeyError, OSError):
                mark = json.loads(process.environ()[ENVIRONMENT])
                if mark["root"] == self._root and process.pid != os.getpid():
                    yield process, f"{mark['job_id']}-a{mark['attempt']}"

    def _lock(self, attempt_id: str) -> Path:
        return self._folder / f"{attempt_id}.lock"

    def _pid(self, attempt_id: str) -> int | None:
        """Return the number of the driver that holds the attempt's lock; None where none does."""
        try:
            handle = os.open(self._lock(attempt_id), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            end = time.monotonic() + LOCK_S  # a driver writes its number just after it has the lock
            while (pid := self._read_pid(attempt_id)) is None and time.monotonic() < end:
                time.sleep(0.01)
            return pid
        finally:
            os.close(handle)
        return None

    def _read_pid(self, attempt_id: str) -> int | None:
        try:
            written = self._lock(attempt_id).read_bytes()
        except FileNotFoundError:
            return None
        return int(written) if written else None


def _tail(log: Path) -> str:
    """Return the last lines of a driver's own log."""
    try:
        text = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    return "; ".join(line.strip() for line in text.splitlines()[-4:] if line.strip())[-500:]


def _take_lock(handle: int) -> None:
    """Lock for the life of this process. A check of the lock holds it for a moment; for longer, another driver does."""
    end = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                sys.exit("another driver of this attempt runs on this machine")
        time.sleep(0.01)


def _main() -> int:
    from graftwork.cluster.jobs.driver import drive
    from graftwork.cluster.jobs.supervisor import run_supervised

    lock, root, job_id, number = sys.argv[1:]
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _take_lock(handle)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return run_supervised(lambda: drive(root, job_id, int(number), "local"))


def fit(job: Job, root: str, folder: Path) -> list[Finding]:
    """Findings of a job; nothing stays on disk but the folder of locks."""
    found = [*secret_findings(job)]
    for demand in job.demands:
        found += _worker_findings(demand)
    for name, size in dict(gpus_here() if job.demand.gpus_per_worker else []).items():
        found += gpu_memory_findings(job, "demand.memory", name, size or None)
    return [*found, *gpu_share_findings(job), *_all_folder_findings(root, folder)]


def health(root: str, folder: Path, left: Mapping[str, Sequence[int]]) -> list[Finding]:
    """Findings of the machine. `left`: processes of attempts whose driver is gone."""
    return [
        *_all_folder_findings(root, folder),
        *_folder_findings("temp", Path(tempfile.gettempdir())),
        *_memory_findings(),
        *_left_findings(left),
    ]


def machines_here() -> TargetMachines:
    """This machine, with the memory that is free now."""
    cards = gpus_here()
    sizes = [size for _, size in cards]
    return TargetMachines(
        "this machine",
        max(cores(), 2),
        available_memory(),
        len(cards),
        tuple(dict.fromkeys(name for name, _ in cards)),
        min(sizes, default=0),
    )


def _worker_findings(demand: Demand) -> Findings:
    workers, cpus = demand.num_workers, demand.num_workers * demand.cpus_per_worker
    if cpus > max(cores(), 2):
        yield refuse(
            "CPU-FIT",
            "demand.cpus",
            f"{workers} workers ask for {cpus:g} CPUs of {cores()}",
            "all workers run at once",
            "fewer workers, or fewer CPUs per worker, or another --target",
        )
    gpus, cards = workers * demand.gpus_per_worker, len(gpus_here()) if demand.gpus_per_worker else 0
    if gpus > cards:
        yield refuse(
            "GPU-FIT",
            "demand.gpus",
            f"{workers} workers ask for {gpus:g} GPUs of {cards}",
            "nvidia-smi lists them, less what CUDA_VISIBLE_DEVICES hides",
            "fewer workers, or a --target with GPUs",
        )
    wanted, total, free = workers * demand.memory_bytes_per_worker, psutil.virtual_memory().total, available_memory()
    if wanted > HEADROOM * free:
        yield refuse(
            "MEMORY-FIT",
            "demand.memory",
            f"{wanted / GIB:.1f} GiB predicted; {total / GIB:.1f} GiB are here, {free / GIB:.1f} GiB free now",
            f"a run may take {HEADROOM:.0%} of the free memory",
            "a smaller batch or base, quantisation, another --target, or end what uses the memory",
        )


def _all_folder_findings(root: str, folder: Path) -> list[Finding]:
    local = [("root", Path(root))] if Store(root).is_local else []
    return [finding for where, path in [*local, ("cache", folder)] for finding in _folder_findings(where, path)]


def _folder_findings(where: str, path: Path) -> list[Finding]:
    there = next(above for above in [path, *path.parents] if above.exists())
    other = "set another root" if where == "root" else "set GRAFTWORK_CACHE to another folder"
    if not there.is_dir():
        return [refuse("FOLDER-NOT-WRITABLE", where, f"{there} is a file", "it holds files of jobs", other)]
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return [
            refuse(
                "FOLDER-NOT-WRITABLE",
                where,
                f"{there}: {error.strerror}",
                "it holds files of jobs",
                f"give your user write rights on {there}, or {other}",
            )
        ]
    found = f"{free / GIB:.2f} GiB are free on the disk of {there}"
    if free < FULL_BYTES:
        return [refuse("DISK-FULL", where, found, "logs and checkpoints would be lost", f"free it, or {other}")]
    if free < TIGHT_BYTES:
        return [warn("DISK-TIGHT", where, found, "a checkpoint may not fit", f"free it, or {other}")]
    return []


def _memory_findings() -> Findings:
    free, shared = available_memory(), shutil.disk_usage(SHM).free if SHM.is_dir() else OBJECT_STORE_BYTES
    if free < 2 * GIB:
        yield warn(
            "MEMORY-BUSY",
            "memory",
            f"{free / GIB:.1f} GiB are free",
            "a private Ray takes about 1 GiB",
            "end what runs, or wait for it",
        )
    if shared < OBJECT_STORE_BYTES:
        yield warn(
            "SHM-SMALL",
            str(SHM),
            f"{shared / 2**20:.0f} MiB are free",
            f"Ray's object store takes {OBJECT_STORE_BYTES >> 20} MiB of it, else it is on a disk",
            "docker run --shm-size=1g",
        )


def _left_findings(left: Mapping[str, Sequence[int]]) -> Findings:
    for attempt_id, pids in left.items():
        yield warn(
            "PROCESSES-LEFT",
            attempt_id,
            f"{len(pids)} processes outlived its driver: {list(pids)}",
            "they hold memory and may write",
            f"graftwork jobs cancel {attempt_id.rpartition('-a')[0]}",
        )
    for path in Path(tempfile.gettempdir()).glob(f"{DIR_PREFIX}*"):
        if path.is_dir() and not _is_locked(path):
            yield warn(
                "RAY-LEFT",
                str(path),
                "the folder of a private Ray whose owner was killed",
                "the next private Ray removes it",
                "nothing, or remove it",
            )


def _is_locked(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return True  # it goes away, or it is another user's
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


if __name__ == "__main__":
    sys.exit(_main())
