"""Set before any test imports Triton or starts a process. How `make test` orders the files for its processes."""

import gc
import os
import signal

import pytest
import torch

FIRST = (
    "tests/docs/test_demo.py",
    "tests/unit/compat/",  # some skip themselves once this process has the Ray of tests/ray
    "tests/ray/test_train.py",
    "tests/ray/",
    "tests/s3/",
    "tests/unit/training/",
    "tests/unit/serving/",
)
"""These files run first: short ones fill the gaps at the end."""

if not torch.cuda.is_available():  # without a GPU Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: its children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many test processes as there are cores
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over modules and test items: each training run collects, for a second otherwise."""
    gc.collect()
    gc.freeze()
