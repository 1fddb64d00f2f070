"""Whether this machine has what a job asks for, and what keeps it from running jobs at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from graftwork.accelerators import gpus_here
from graftwork.cluster.backend import Demand, Finding, Job
from graftwork.cluster.local import DIR_PREFIX, OBJECT_STORE_BYTES
from graftwork.cluster.secret_like import secret_findings
from graftwork.cluster.stage_check import gpu_memory_findings, gpu_share_findings
from graftwork.cluster.target_machines import TargetMachines
from graftwork.machine import available_memory, cores
from graftwork.plan.stage import HEADROOM
from graftwork.storage import Store

GIB = 2**30
SHM = Path("/dev/shm")
FULL_BYTES = 64 * 2**20
"""With less than this a disk counts as full: logs, spec and heartbeats would be lost."""
TIGHT_BYTES = GIB


def fit(job: Job, root: str, folder: Path) -> list[Finding]:
    """Findings of a job; nothing stays on disk but the folder of locks."""
    found = [finding for demand in job.demands for finding in _workers(demand)]
    return [*secret_findings(job), *found, *_gpu_memory(job), *gpu_share_findings(job), *_folders(root, folder)]


def health(root: str, folder: Path, left: Mapping[str, Sequence[int]]) -> list[Finding]:
    """Findings of the machine. `left`: processes of attempts whose driver is gone."""
    return [*_folders(root, folder), *_memory_now(), *_shared_memory(), *_temp(), *_left(left), *_dead_rays()]


def machines_here() -> TargetMachines:
    """This machine, with the memory that is free now."""
    cards = gpus_here()
    sizes = [size for _, size in cards]
    return TargetMachines("this machine", max(cores(), 2), available_memory(), len(cards),
                          tuple(dict.fromkeys(name for name, _ in cards)), min(sizes, default=0))  # fmt: skip


def _workers(demand: Demand) -> list[Finding]:
    found = []
    cpus = demand.num_workers * demand.cpus_per_worker
    if cpus > max(cores(), 2):
        found.append(Finding(
            "E-CPU-FIT", "error", "demand.cpus", f"{demand.num_workers} workers ask for {cpus:g} CPUs of {cores()}",
            "all workers run at once", "fewer workers, or fewer CPUs per worker, or another --target",
        ))  # fmt: skip
    gpus, cards = demand.num_workers * demand.gpus_per_worker, gpus_here() if demand.gpus_per_worker else []
    if gpus > len(cards):
        found.append(Finding(
            "E-GPU-FIT", "error", "demand.gpus", f"{demand.num_workers} workers ask for {gpus:g} GPUs of {len(cards)}",
            "nvidia-smi lists them, less what CUDA_VISIBLE_DEVICES hides", "fewer workers, or a --target with GPUs",
        ))  # fmt: skip
    return [*found, *_memory(demand.num_workers * demand.memory_bytes_per_worker)]


def _gpu_memory(job: Job) -> Iterator[Finding]:
    for name, size in dict(gpus_here() if job.demand.gpus_per_worker else []).items():
        yield from gpu_memory_findings(job, "demand.memory", name, size or None)


def _memory(wanted: int) -> list[Finding]:
    total, free = psutil.virtual_memory().total, available_memory()
    if wanted <= HEADROOM * free:
        return []
    found = f"{wanted / GIB:.1f} GiB predicted; {total / GIB:.1f} GiB are here, {free / GIB:.1f} GiB free now"
    return [
        Finding(
            "E-MEMORY-FIT", "error", "demand.memory", found, f"a run may take {HEADROOM:.0%} of the free memory",
            "a smaller batch or base, quantisation, another --target, or end what uses the memory",
        )
    ]  # fmt: skip


def _folders(root: str, folder: Path) -> list[Finding]:
    local = [("root", Path(root))] if Store(root).is_local else []
    return [finding for where, path in [*local, ("cache", folder)] for finding in _folder(where, path)]


def _folder(where: str, path: Path) -> list[Finding]:
    there = next(above for above in [path, *path.parents] if above.exists())
    other = "set another root" if where == "root" else "set GRAFTWORK_CACHE to another folder"
    if not there.is_dir():
        return [Finding("E-FOLDER-NOT-WRITABLE", "error", where, f"{there} is a file", "it holds files of jobs", other)]
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return [Finding("E-FOLDER-NOT-WRITABLE", "error", where, f"{there}: {error.strerror}", "it holds files of jobs",
                        f"give your user write rights on {there}, or {other}")]  # fmt: skip
    found = f"{free / GIB:.2f} GiB are free on the disk of {there}"
    if free < FULL_BYTES:
        return [
            Finding("E-DISK-FULL", "error", where, found, "logs and checkpoints would be lost", f"free it, or {other}")
        ]
    if free < TIGHT_BYTES:
        return [Finding("W-DISK-TIGHT", "warning", where, found, "a checkpoint may not fit", f"free it, or {other}")]
    return []


def _memory_now() -> list[Finding]:
    free = available_memory()
    return [] if free >= 2 * GIB else [
        Finding("W-MEMORY-BUSY", "warning", "memory", f"{free / GIB:.1f} GiB are free",
                "a private Ray takes about 1 GiB", "end what runs, or wait for it")
    ]  # fmt: skip


def _shared_memory() -> list[Finding]:
    if not SHM.is_dir() or (free := shutil.disk_usage(SHM).free) >= OBJECT_STORE_BYTES:
        return []
    rule = f"Ray's object store takes {OBJECT_STORE_BYTES >> 20} MiB of it, else it lies on a disk"
    return [Finding("W-SHM-SMALL", "warning", str(SHM), f"{free / 2**20:.0f} MiB are free", rule,
                    "docker run --shm-size=1g")]  # fmt: skip


def _temp() -> list[Finding]:
    return _folder("temp", Path(tempfile.gettempdir()))


def _left(left: Mapping[str, Sequence[int]]) -> list[Finding]:
    return [
        Finding("W-PROCESSES-LEFT", "warning", attempt_id, f"{len(pids)} processes outlived its driver: {list(pids)}",
                "they hold memory and may write", f"graftwork jobs cancel {attempt_id.rpartition('-a')[0]}")
        for attempt_id, pids in left.items()
    ]  # fmt: skip


def _dead_rays() -> list[Finding]:
    dead = [path for path in Path(tempfile.gettempdir()).glob(f"{DIR_PREFIX}*") if path.is_dir() and not _is_held(path)]
    return [
        Finding("W-RAY-LEFT", "warning", str(path), "the folder of a private Ray whose owner was killed",
                "the next private Ray removes it", "nothing, or remove it")
        for path in dead
    ]  # fmt: skip


def _is_held(folder: Path) -> bool:
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
