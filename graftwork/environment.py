"""Facts of this process and its machine: CPU, memory, measured speed, and the provenance of every result."""

import functools
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from graftwork import __version__
from graftwork.storage.store import cache_root


@functools.cache
def cpu_facts() -> dict[str, str]:
    """Return the fields of /proc/cpuinfo of one core; empty on systems without it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    return dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text, re.M))


def flags() -> frozenset[str]:
    """Return the instruction sets; empty where the system lists none."""
    return frozenset((cpu_facts().get("flags") or cpu_facts().get("Features") or "").split())


PROBE_S = 0.15
GEMM = (128, 1024, 512)
"""Rows, inputs, outputs: some 2 ms a core, less than a time slice, so that an undisturbed call is met on a machine that
does other things as well."""
GEMV = 4096
"""Inputs and outputs of the matrix-vector probe: 64 MiB, more than most caches."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Speed:
    """Measured speed of one core."""

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
    path = speed_file()
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


def speed_file() -> Path:
    """Where `measure_speed` keeps what it found: one file for each machine and version of PyTorch."""
    parts = (platform.node(), platform.machine(), *sorted(flags()), metadata.version("torch"), "fp32 bf16")
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    return cache_root() / "machine" / f"{key}.json"


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
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        # bytes of file pages in the container's usage: the kernel drops them before it kills
        pages = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
        free = min(free, int(text) - int(used.read_text(encoding="ascii")) + pages)
    return free


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


PACKAGES = ("ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors", "numpy", "s3fs")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""The only environment variables that are recorded: they change speed and placement, and hold no secret."""

_ISA_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
_SECRET_FLAG = re.compile(r"(?i)(token|secret|passw(or)?d|credentials?|api[-_]?key|access[-_]?key)$")
_URI_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_GIT_TIMEOUT_S = 10


def collect(seed: int, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return provenance: what is known of this process and machine, JSON-ready. Sizes in bytes, time in UTC.

    `argv` is the command (default: this process's), with values of secret-looking flags and logins in URIs hidden.
    No user or host name and no environment but `THREAD_VARIABLES` is recorded. Takes some 50 ms; never raises.
    """
    packages = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "graftwork": __version__,
        "git": _git(Path(__file__).resolve().parent.parent),
        "argv": redact(sys.argv if argv is None else argv),
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "hardware": hardware(),
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, instruction sets, memory and GPUs of this machine."""
    import psutil

    facts = cpu_facts()
    model = facts.get("model name") or facts.get("Model") or platform.processor() or platform.machine()
    gpus = []
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    with suppress(OSError, subprocess.SubprocessError):  # a FileNotFoundError where there is no driver
        for line in _run("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines():
            cells = [cell.strip() for cell in line.split(",")]
            if len(cells) == 4:
                name, mib, driver, capability = cells
                size = int(mib) << 20 if mib.isdigit() else None
                gpus.append({"name": name, "memory_bytes": size, "driver": driver, "sm": capability})
    return {
        "cpu": model,
        "cores": cores(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags()],
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": gpus,
    }


def redact(argv: Sequence[str]) -> list[str]:
    """A command line without the values of secret-looking flags and without logins in URIs."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        flag, sep, _ = word.partition("=")
        secret = _SECRET_FLAG.search(flag) is not None
        if hide_next and not word.startswith("-"):
            shown.append("***")
        elif secret and sep:
            shown.append(f"{flag}=***")
        else:
            shown.append(_URI_LOGIN.sub("***@", word))
        hide_next = secret and not sep and word.startswith("-")
    return shown


def _git(root: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that this code runs from; None where it is installed or git is missing."""
    try:
        _run("git", "-C", str(root), "ls-files", "--error-unmatch", "graftwork/__init__.py")
        sha = _run("git", "-C", str(root), "rev-parse", "HEAD").strip()
        dirty = bool(_run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return None
    return {"sha": sha, "dirty": dirty}


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout
