"""Progress is told beside the work: to its last step, and without holding up the end of who does the work."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from graftwork.errors import RunError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.report import Progress, follow_progress
from graftwork.training.worker_messages import StepLog, StepReport
from tests.process_races import ROOT

WITHIN_S = 30
HANGS_AND_IS_STOPPED = """
import sys, threading
from graftwork.storage.store import RunPaths, Store
from graftwork.training.report import follow_progress

told = threading.Event()

def hang(progress):
    told.set()
    threading.Event().wait()

try:
    with follow_progress(RunPaths(Store(sys.argv[1]), "t", "0" * 64), hang):
        told.wait()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("stopped", flush=True)
    sys.exit(7)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(Store(str(tmp_path)), "t", "0" * 64)


@pytest.fixture
def log(run: RunPaths) -> StepLog:
    """With one step."""
    log = StepLog(run)
    log.add(step(1))
    return log


def step(number: int) -> StepReport:
    return StepReport(number, 10, loss=2.0, lr=1e-3, grad_norm=1.0, tokens=10 * number, elapsed_s=number, step_s=0.4)


def test_steps_are_told_while_the_work_goes_on_and_the_last_when_it_has_ended(run: RunPaths, log: StepLog) -> None:
    told: list[Progress] = []
    first = threading.Event()

    def tell(progress: Progress) -> None:
        told.append(progress)
        first.set()

    with follow_progress(run, tell):
        assert first.wait(WITHIN_S), "told meanwhile"
        log.add(step(2))
    assert [(progress.step, progress.total_steps) for progress in told] == [(1, 10), (2, 10)]


def work(run: RunPaths, error: Exception | None = None) -> None:
    """Work that ends, well or with an error, after the telling has failed."""
    failed = threading.Event()

    def fail(_: Progress) -> None:
        failed.set()
        raise ValueError("no terminal")

    with follow_progress(run, fail):
        assert failed.wait(WITHIN_S)
        if error is not None:
            raise error


def test_a_telling_that_failed_is_raised_when_the_work_has_ended(run: RunPaths, log: StepLog) -> None:
    with pytest.raises(ValueError, match="no terminal"):
        work(run)


def test_the_error_of_the_work_comes_before_that_of_the_telling(run: RunPaths, log: StepLog) -> None:
    with pytest.raises(RunError, match="workers are lost"):
        work(run, RunError("training t", "workers are lost"))


def test_a_telling_that_hangs_keeps_no_stopped_process(run: RunPaths, log: StepLog) -> None:
    """An executor's thread would: the interpreter joins it at its exit."""
    command = [sys.executable, "-c", HANGS_AND_IS_STOPPED, run.store.uri]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=WITHIN_S)
    assert (ended.returncode, ended.stdout) == (7, "stopped\n"), ended.stderr
