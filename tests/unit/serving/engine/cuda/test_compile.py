"""Every GPU kernel compiles for an H100 and fits into one of its multiprocessors. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_BYTES = 227 * 1024
"""Shared memory that one block may have: CUDA C++ programming guide, compute capability 9.0."""


def test_kernels_compile_for_an_h100_without_spilling(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_builds"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[5],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {one.pop("kernel"): one for one in map(json.loads, done.stdout.splitlines())}
    assert len(kernels) == 14
    assert {name: one["spilled"] for name, one in kernels.items() if one["spilled"]} == {}
    assert {name: one["shared"] for name, one in kernels.items() if one["shared"] > SHARED_BYTES} == {}
    plain = {"write", "join", "nf4 sum", "norm", "gated", "shrink fp32"}  # fp32 is summed exactly, not as tf32
    assert {name for name, one in kernels.items() if not one["tensor_cores"]} == plain
