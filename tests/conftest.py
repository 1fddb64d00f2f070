"""Set before any test imports Triton or starts a process. How `make test` orders the files for its processes."""

import gc
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

FIRST = (
    "tests/docs/test_demo.py",
    "tests/docs/test_extending.py",
    "tests/unit/compat/",  # some skip themselves once this process has the Ray of tests/ray
    "tests/ray/test_train.py",
    "tests/ray/",
    "tests/s3/",
    "tests/unit/training/",
    "tests/unit/serving/",
)
"""These files run first: short ones fill the gaps at the end."""


def prepare_process() -> None:
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if not alone:  # one of as many test processes as there are cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: its children would ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    import torch

    if not torch.cuda.is_available():  # without a GPU Triton's kernels run in its interpreter
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if not alone:
        torch.set_num_threads(1)


prepare_process()
settings.register_profile("loaded", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loaded")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))


def pytest_collection_finish() -> None:
    """Keep modules and test items out of each later search for garbage. A training run and an engine begin with one."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Triton complains about objects that are alive at exit
