"""Deadline, budget and the time in the queue stop a job cleanly, and say which of them did."""

from graftwork.cluster.jobs.models import Attempt
from tests.backends.local_target import Here

TIDY = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("put away"))
at_work()
time.sleep(600)
"""


def test_a_deadline_stops_it(here: Here) -> None:
    job = here.python(TIDY, limits={"deadline": 2})
    ended = here.run(job)
    assert (ended.state, ended.exit_code) == ("stopped", None)
    assert ended.started_at is not None
    assert ended.ended_at is not None
    assert 2 <= ended.ended_at - ended.started_at < 10
    assert here.log(job.job_id) == "at work\nput away\n"
    here.nothing_left(job.job_id)


def test_a_deadline_that_it_keeps_does_nothing(here: Here) -> None:
    assert here.run(here.python("pass", limits={"deadline": 60})).state == "succeeded"


def test_a_budget_stops_it(here: Here) -> None:
    """Head and one worker, 12 CPUs, at 300 dollars a CPU and hour: 1 dollar a second."""
    job = here.python(TIDY, limits={"budget_usd": 2}, prices={"cpu_hour": 300})
    ended = here.run(job)
    assert ended.state == "stopped"
    assert here.log(job.job_id).endswith("put away\n")
    beat = here.runs.attempt(job.job_id, 1).heartbeat
    assert beat is not None
    assert beat.usd is not None


def test_a_job_that_waits_in_its_place_for_too_long_is_stopped_by_who_waits_for_it(here: Here) -> None:
    job = here.python("print('too late')", limits={"pending": 1})
    here.runs.record(job, here.ground.on)
    here.runs.open_attempt(job.job_id, 1)
    with here.ground.hold(Attempt(job, 1)):
        assert here.backend.wait(job.job_id, 60).state == "stopped"
    assert here.log(job.job_id) == ""


def test_a_running_job_is_not_stopped_by_the_limit_of_its_wait(here: Here) -> None:
    job = here.python("import time; at_work(); time.sleep(13)", limits={"pending": 10})
    here.start(job)
    assert here.backend.wait(job.job_id, 60).state == "succeeded"
