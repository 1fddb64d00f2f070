"""Where a number comes from: code, versions, machine, seed and command, as one plain dict for manifests and reports."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from graftwork import __version__, cpu

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
    """What is known of this process and machine, JSON-ready. Sizes in bytes, time in UTC.

    `argv` is the command (default: this process's), with values of secret-looking flags and logins in URIs hidden.
    No user or host name and no environment but `THREAD_VARIABLES` is recorded. Takes some 50 ms; never raises.
    """
    return {
        "graftwork": __version__,
        "git": _git(Path(__file__).resolve().parent.parent),
        "argv": redact(sys.argv if argv is None else argv),
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "hardware": hardware(),
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, instruction sets, memory and GPUs of this machine."""
    import psutil

    facts = cpu.facts()
    model = facts.get("model name") or facts.get("Model") or platform.processor() or platform.machine()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": [flag for flag in _ISA_FLAGS if flag in cpu.flags()],
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": _gpus(),
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


def _gpus() -> list[dict[str, Any]]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        lines = _run("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
    return [
        {"name": name, "memory_bytes": int(mib) << 20 if mib.isdigit() else None, "driver": driver, "sm": capability}
        for name, mib, driver, capability in (row for row in rows if len(row) == 4)
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout
