"""What this machine has and how fast it is: available memory, measured matmul rate and memory bandwidth."""

import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from graftwork import cpu
from graftwork.storage import cache_root

PROBE_S = 0.15
GEMM = (128, 1024, 512)
"""Rows, inputs, outputs: some 2 ms a core, less than a time slice, so that an undisturbed call is met on a machine that
does other things as well."""
GEMV = 4096
"""Inputs and outputs of the matrix-vector probe: 64 MiB, more than most caches."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Speed:
    """What one core reaches."""

    gflops: float
    """10^9 operations a second in a matrix product in fp32, multiply and add counted as two."""
    gbytes_per_s: float
    """10^9 bytes of weights read a second in a matrix-vector product."""
    bf16_gflops: float | None = None
    """As `gflops`, in bf16; None where it was not probed."""


def measure_speed() -> Speed:
    """Probe one core: about 0.5 s (and PyTorch's import) the first time on a machine, then from the cache.

    The best of many short calls is taken, so that another process' burst does not count; with one thread, because two
    that wait for each other measure the other processes (14 to 130 GFLOP/s were seen on two cores). Writes
    `<cache>/machine/<key>.json`, unless the machine is busy now: what it reaches then is no measure for later.
    """
    path = cache_root() / "machine" / f"{_key()}.json"
    if path.exists():
        return Speed(**json.loads(path.read_text(encoding="utf-8")))
    speed = _probe()
    if os.getloadavg()[0] > cores():
        return speed
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(speed)), encoding="utf-8")
    temporary.replace(path)
    return speed


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far.

    Linux adds the parent's peak to `ru_maxrss` of a process that was started by vfork (`subprocess`), so the kernel's
    figure of this address space is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that new processes can take now: what the kernel calls available, within the container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="ascii")) + _reclaimable())
    return free


def _reclaimable() -> int:
    """Bytes of file pages in the container's usage: the kernel drops them before it kills."""
    lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))


def _key() -> str:
    parts = (platform.node(), platform.machine(), *sorted(cpu.flags()), metadata.version("torch"), "fp32 bf16")
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _probe() -> Speed:
    import torch
    from torch.nn.functional import linear

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, inputs, outputs = GEMM
        x_RI, w_OI = torch.ones(rows, inputs), torch.ones(outputs, inputs)
        gemm_s = _best_s(lambda: linear(x_RI, w_OI))
        half_RI, half_OI = x_RI.bfloat16(), w_OI.bfloat16()
        half_s = _best_s(lambda: linear(half_RI, half_OI))
        x_1I, w_II = torch.ones(1, GEMV), torch.ones(GEMV, GEMV)
        gemv_s = _best_s(lambda: linear(x_1I, w_II))
    finally:
        torch.set_num_threads(before)
    operations = 2 * rows * inputs * outputs / 1e9
    return Speed(
        round(operations / gemm_s, 1), round(4 * GEMV**2 / gemv_s / 1e9, 1), bf16_gflops=round(operations / half_s, 1)
    )


def _best_s(work: Callable[[], object]) -> float:
    """Least seconds of one call, over calls for `PROBE_S`, after a first one."""
    work()
    best, end = float("inf"), time.perf_counter() + PROBE_S
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
