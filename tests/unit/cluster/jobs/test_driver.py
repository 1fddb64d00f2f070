"""What the driver of a job does, seen in its store: real processes on the local place."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from graftwork.cluster.jobs.heartbeat import MOST_PIECE_BYTES, complete_utf8_length, last_error
from graftwork.cluster.jobs.store import JobStore
from graftwork.errors import ConfigError
from tests.jobs import end_all_jobs, local_backend, printed, python_job
from tests.waiting import until


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    yield str(tmp_path / "root")
    end_all_jobs(str(tmp_path / "root"))


@pytest.fixture
def program(tmp_path: Path) -> str:
    """Leaves a child in a session of its own, writes both pids and waits."""
    return f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
print('step 3 of 9, loss 1.5')
open({str(tmp_path / "new")!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')
os.rename({str(tmp_path / "new")!r}, {str(tmp_path / "pids")!r})
time.sleep(600)
"""


def pids(folder: Path) -> list[int]:
    until((folder / "pids").exists)
    return [int(word) for word in (folder / "pids").read_text().split()]


def gone(numbers: list[int]) -> bool:
    return not any(psutil.pid_exists(n) and psutil.Process(n).status() != "zombie" for n in numbers)


def driver(root: str, job_id: str) -> int:
    beat = until(lambda: JobStore(root).latest(job_id).heartbeat)
    return int(beat.pid)


@pytest.mark.parametrize("data", ["plain", "é", "a€", "😀", "x😀é"], ids=["ascii", "two", "three", "four", "several"])
def test_no_piece_of_a_log_ends_within_a_character(data: str) -> None:
    whole = data.encode()
    for cut in range(len(whole) + 1):
        kept = complete_utf8_length(whole[:cut])
        assert data.startswith(whole[:kept].decode()), "what is kept is text"
        assert cut - kept < 4
    assert complete_utf8_length(b"\xff\xff\xff\xff\xff") > 0, "what is no text is not held back for ever"


def test_the_last_error_is_ours_as_a_whole_else_the_last_line() -> None:
    ours = ConfigError("optim.lr=0", "it is 0\n    twice", "a rate is positive", "raise it")
    assert last_error(f"noise\n{ours}\nmore noise\n") == str(ours)
    assert last_error("Traceback (most recent call last):\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert last_error("") == ""


def test_a_job_that_fails_says_why_and_what_it_printed(root: str) -> None:
    job = python_job(root, "print('one'); print('€' * 10); raise SystemExit('ValueError: no such row')")
    here = local_backend(root)
    here.submit(job)
    ended = here.wait(job.job_id, timeout_s=60)
    assert (ended.state, ended.exit_code, ended.cause) == ("failed", 1, "failed")
    assert ended.why == "ValueError: no such row"
    assert printed(root, job.job_id) == "one\n" + "€" * 10 + "\nValueError: no such row\n"
    assert [event.what for event in here.runs.events(job.job_id, 1)] == ["started", "ended"]


def test_a_command_that_sees_the_cancellation_before_its_driver_is_cancelled_not_failed(root: str) -> None:
    """Workers look for the request themselves and leave; a run without Ray ends within milliseconds of that."""
    program = """
import sys
from graftwork.cluster.jobs.fencing import Fence
from graftwork.cluster.jobs.store import JobStore
fence = Fence.from_environment()
JobStore(fence.root).ask_to_end(fence.job_id, fence.attempt, "user")
sys.exit(1)
"""
    job = python_job(root, program)
    here = local_backend(root)
    here.submit(job)
    ended = until(lambda: here.runs.attempt(job.job_id, 1).ended)
    assert (ended.reason, ended.exit_code) == ("user", 1)
    assert here.status(job.job_id).state == "cancelled"


@pytest.mark.long
def test_killed_for_memory_is_told_from_failed(root: str) -> None:
    job = python_job(root, "import os; os.kill(os.getpid(), 9)", retry={"max_attempts": 2, "on": ["oom"]})
    here = local_backend(root)
    here.submit(job)
    ended = here.wait(job.job_id, timeout_s=60)
    assert (ended.attempt, ended.state, ended.exit_code, ended.cause) == (2, "failed", 137, "oom")
    [retry] = [event for event in here.runs.events(job.job_id, 2) if event.what == "retry"]
    assert (retry.facts["of"], retry.facts["cause"]) == (1, "oom")


@pytest.mark.long
def test_nothing_of_a_killed_driver_runs_on(root: str, program: str, tmp_path: Path) -> None:
    job = python_job(root, program)
    here = local_backend(root)
    here.submit(job)
    below = pids(tmp_path)
    until(lambda: here.status(job.job_id).progress == "step 3 of 9, loss 1.5")
    os.kill(driver(root, job.job_id), signal.SIGKILL)
    until(lambda: gone(below), within_s=10)


@pytest.mark.long
def test_a_cancelled_job_leaves_nothing_not_even_what_left_its_group(root: str, program: str, tmp_path: Path) -> None:
    job = python_job(root, program)
    here = local_backend(root)
    here.submit(job)
    below = pids(tmp_path)
    began = time.monotonic()
    assert here.cancel(job.job_id).state == "cancelled"
    assert gone([*below, driver(root, job.job_id)])
    assert time.monotonic() - began < 10


@pytest.mark.long
def test_a_deadline_stops_a_job_that_does_not_listen(root: str) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(600)"
    job = python_job(root, f"{deaf}", limits={"deadline": 1})
    here = local_backend(root)
    here.submit(job)
    until(lambda: here.runs.cancel_reason(job.job_id, 1) == "deadline")
    here.cancel(job.job_id)  # does not wait out the half minute that a limit leaves
    ended = here.status(job.job_id)
    assert ended.state == "stopped"
    assert "deadline" in ended.why


@pytest.mark.long
def test_a_driver_whose_machine_goes_is_no_end_of_the_job(root: str, tmp_path: Path) -> None:
    waits = "import time; print('here'); time.sleep(600)"
    job = python_job(root, waits, retry={"max_attempts": 1})
    here = local_backend(root)
    here.submit(job)
    until(lambda: here.status(job.job_id).state == "running")
    os.kill(driver(root, job.job_id), signal.SIGTERM)
    found = until(lambda: status if (status := here.status(job.job_id)).ended else None)
    assert (found.state, found.cause) == ("lost", "preempted")
    record = here.runs.latest(job.job_id)
    assert record.ended is None
    assert record.heartbeat is not None
    assert record.heartbeat.leaving
    assert [event.what for event in here.runs.events(job.job_id, 1)] == ["started", "machine-leaves", "left"]


@pytest.mark.long
def test_a_flood_of_output_is_kept_whole_in_pieces_of_bounded_size(root: str) -> None:
    job = python_job(root, "for n in range(400_000): print(n, '€' * 20)")
    here = local_backend(root)
    here.submit(job)
    assert here.wait(job.job_id, timeout_s=100).state == "succeeded"
    assert printed(root, job.job_id) == "".join(f"{n} {'€' * 20}\n" for n in range(400_000))
    sizes = here.runs.store.children("jobs", job.job_id, "a1", "logs").values()
    assert max(size or 0 for size in sizes) <= MOST_PIECE_BYTES
    assert len(sizes) > 1
    for name in here.runs.store.list("jobs", job.job_id, "a1", "logs"):
        here.runs.store.read_text("jobs", job.job_id, "a1", "logs", name)  # each is UTF-8 by itself


@pytest.mark.long
def test_a_budget_is_the_jobs_not_the_attempts(root: str) -> None:
    prices, limits = {"cpu_hour": 3600 / 12}, {"budget_usd": 4.0}  # 12 CPUs: 3,600 dollars an hour, one a second
    job = python_job(
        root,
        "import time; time.sleep(2.5); raise SystemExit(1)",
        prices=prices,
        limits=limits,
        workers=({"cpu": "8"},),
        retry={"max_attempts": 9, "on": ["failed"]},
    )
    here = local_backend(root)
    here.submit(job)
    ended = here.wait(job.job_id, timeout_s=60)
    assert (ended.state, ended.attempt) == ("stopped", 2), "2.5 dollars by the first, 1.5 by the second"
    assert "budget" in ended.why
