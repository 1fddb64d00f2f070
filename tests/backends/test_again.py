"""A job that has ended is started again as its next attempt, by a person or by its retry rule, one at a time."""

import time

import pytest

from graftwork.errors import ConfigError, RunError
from tests.backends.local_target import Here

TWICE = """
import os, sys
mark = sys.argv[1]
if os.path.exists(mark):
    print("second")
else:
    open(mark, "w").close()
    print("first")
    sys.exit(5)
"""


def test_a_failed_job_is_started_again_as_the_next_attempt(here: Here) -> None:
    job = here.python(TWICE, str(here.root.parent / "mark"))
    assert here.run(job).exit_code == 5
    again = here.backend.resubmit(job.job_id)
    assert again.attempt == 2
    ended = here.end(job.job_id)
    assert (ended.attempt, ended.state) == (2, "succeeded")
    assert here.log(job.job_id) == "second\n"
    assert "".join(here.backend.logs(job.job_id, attempt=1)) == "first\n"
    assert here.runs.attempts(job.job_id) == [1, 2]


def test_a_cancelled_job_is_started_again(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    here.backend.cancel(job.job_id)
    here.backend.resubmit(job.job_id)
    here.let_go()
    ended = here.end(job.job_id)
    assert (ended.attempt, ended.state) == (2, "succeeded")


def test_a_job_that_succeeded_may_be_started_again(here: Here) -> None:
    job = here.python("pass")
    here.run(job)
    here.backend.resubmit(job.job_id)
    assert (ended := here.end(job.job_id)).state == "succeeded"
    assert ended.attempt == 2


def test_a_running_job_is_not_started_again(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    with pytest.raises(ConfigError, match="attempt 1 is running") as caught:
        here.backend.resubmit(job.job_id)
    assert "jobs cancel" in caught.value.hint
    assert here.runs.attempts(job.job_id) == [1]
    here.backend.cancel(job.job_id)


def test_an_attempt_that_another_one_has_overtaken_ends_itself(here: Here) -> None:
    """As where a client took it for lost while the network was down."""
    job = here.waiting()
    here.start(job)
    here.runs.open_attempt(job.job_id, 2)
    here.nothing_left(job.job_id)
    assert here.runs.attempt(job.job_id, 1).ended is None, "its end is no end of the job"
    assert here.backend.status(job.job_id).attempt == 2


def test_who_waits_for_long_enough_gets_the_end(here: Here) -> None:
    job = here.python("import time; time.sleep(0.5); raise SystemExit(3)")
    here.backend.submit(job)
    assert here.backend.wait(job.job_id, 60).exit_code == 3


def test_who_waits_for_too_short_is_told_and_the_job_goes_on(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    began = time.monotonic()
    with pytest.raises(RunError, match="it is running after 1 s") as caught:
        here.backend.wait(job.job_id, 1)
    assert time.monotonic() - began < WITHIN_S
    assert "jobs wait" in caught.value.hint
    here.let_go()
    assert here.end(job.job_id).state == "succeeded"


WITHIN_S = 10.0


def test_who_waits_starts_it_again_as_its_rule_says(here: Here) -> None:
    job = here.python(TWICE, str(here.root.parent / "mark"), retry={"max_attempts": 3, "on": ["failed"]})
    here.backend.submit(job)
    ended = here.backend.wait(job.job_id, 120)
    assert (ended.attempt, ended.state) == (2, "succeeded")


def test_who_waits_gives_up_after_the_last_attempt(here: Here) -> None:
    job = here.python("raise SystemExit(4)", retry={"max_attempts": 2, "on": ["failed"]})
    here.backend.submit(job)
    ended = here.backend.wait(job.job_id, 120)
    assert (ended.attempt, ended.state, ended.exit_code) == (2, "failed", 4)


def test_a_failure_that_the_rule_does_not_name_stays(here: Here) -> None:
    job = here.python("raise SystemExit(4)", retry={"max_attempts": 3, "on": ["lost"]})
    here.backend.submit(job)
    assert here.backend.wait(job.job_id, 120).attempt == 1
