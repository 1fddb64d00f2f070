"""Cancel ends a job in every state: at return nothing of it is left, and nothing of it starts later."""

import threading
import time

import pytest

from graftwork.cluster.jobs.models import Attempt, JobStatus
from tests.backends.local_target import Here, timeless

WITHIN_S = 10.0
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
at_work()
time.sleep(600)
"""
SPREAD = """
import os, subprocess, sys, time
subprocess.Popen(["sleep", "601"])
subprocess.Popen(["sleep", "602"], start_new_session=True)
if os.fork() == 0:  # its parent goes, so that it is nobody's child
    os.setsid()
    subprocess.Popen(["sleep", "603"])
    os._exit(0)
at_work()
time.sleep(600)
"""
TIDY = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("put away"))
at_work()
time.sleep(600)
"""


def timed_cancel(here: Here, job_id: str) -> JobStatus:
    began = time.monotonic()
    status = here.backend.cancel(job_id)
    assert here.processes(job_id) == [], "at return nothing is left"
    assert time.monotonic() - began < WITHIN_S
    return status


@pytest.mark.core
def test_a_running_job_is_gone_at_return(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    assert here.processes(job.job_id)
    status = timed_cancel(here, job.job_id)
    assert (status.state, status.exit_code) == ("cancelled", None)
    assert here.backend.status(job.job_id).state == "cancelled"
    assert here.log(job.job_id) == "at work\n"


def test_a_command_that_ignores_it_is_killed(here: Here) -> None:
    job = here.python(STUBBORN)
    here.start(job)
    assert timed_cancel(here, job.job_id).state == "cancelled"


def test_what_the_command_started_is_gone_too(here: Here) -> None:
    job = here.python(SPREAD)
    here.start(job)
    assert len(here.processes(job.job_id)) > 4
    assert timed_cancel(here, job.job_id).state == "cancelled"


def test_a_command_may_put_its_things_away(here: Here) -> None:
    job = here.python(TIDY)
    here.start(job)
    assert timed_cancel(here, job.job_id).state == "cancelled"
    assert "put away" in here.log(job.job_id)


def test_a_job_that_waits_in_its_place_never_starts(here: Here) -> None:
    job = here.python("print('too late')")
    here.runs.record(job, here.ground.on)
    here.runs.open_attempt(job.job_id, 1)
    with here.ground.hold(Attempt(job, 1)):
        assert here.backend.status(job.job_id).state in ("submitted", "queued", "pending")
        assert here.backend.cancel(job.job_id).state == "cancelled"
    assert here.backend.place.observe([f"{job.job_id}-a1"]) == {}, "nor does its place know it"
    assert here.backend.submit(job).state == "cancelled"
    assert here.log(job.job_id) == ""


def test_a_job_that_is_cancelled_just_after_its_submission_is_gone(here: Here) -> None:
    job = here.waiting()
    here.backend.submit(job)
    assert here.backend.cancel(job.job_id).state == "cancelled"
    here.nothing_left(job.job_id)


def test_a_job_that_has_ended_stays_as_it_ended(here: Here) -> None:
    job = here.python("pass")
    ended = here.run(job)
    assert timeless(here.backend.cancel(job.job_id)) == timeless(ended)
    assert ended.state == "succeeded"


def test_cancelling_twice_is_cancelling_once(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    first = here.backend.cancel(job.job_id)
    assert timeless(here.backend.cancel(job.job_id)) == timeless(first)
    assert first.state == "cancelled"


def test_many_may_cancel_at_once(here: Here) -> None:
    job, found = here.waiting(), list[JobStatus]()
    here.start(job)
    crew = [threading.Thread(target=lambda: found.append(here.backend.cancel(job.job_id))) for _ in range(4)]
    for client in crew:
        client.start()
    for client in crew:
        client.join()
    assert [status.state for status in found] == ["cancelled"] * 4
    here.nothing_left(job.job_id)


def test_a_cancelled_job_is_not_started_by_who_submits_it_again(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    here.backend.cancel(job.job_id)
    assert here.backend.submit(job).state == "cancelled"
    assert here.processes(job.job_id) == []


def test_only_that_job_is_ended(here: Here) -> None:
    job, other = here.waiting(name="this"), here.waiting(name="other")
    here.start(job)
    here.start(other)
    here.backend.cancel(job.job_id)
    assert here.backend.status(other.job_id).state == "running"
    here.let_go()
    assert here.end(other.job_id).state == "succeeded"
