"""A driver that is killed, a place that is away: what is known is said, and what is left is removed."""

import contextlib
import time

import pytest

from graftwork.errors import ClusterError
from tests.backends.local_target import Here

LOST_S = 30.0
AWAY_S = 25.0


@pytest.mark.core
def test_a_job_whose_driver_is_killed_is_lost_and_nothing_of_it_is_left(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    here.lose_driver(job.job_id)
    began = time.monotonic()
    ended = here.end(job.job_id)
    assert ended.state == "lost"
    assert time.monotonic() - began < LOST_S
    here.nothing_left(job.job_id, LOST_S)


def test_a_lost_job_is_started_again_by_who_waits_for_it(here: Here) -> None:
    job = here.waiting(retry={"max_attempts": 2, "on": ["lost"]})
    here.start(job)
    here.lose_driver(job.job_id)
    here.let_go()
    ended = here.backend.wait(job.job_id, 120)
    assert (ended.attempt, ended.state) == (2, "succeeded")


def test_a_lost_job_can_be_cancelled(here: Here) -> None:
    job = here.waiting()
    here.start(job)
    here.lose_driver(job.job_id)
    here.end(job.job_id)
    assert here.backend.cancel(job.job_id).state == "cancelled"
    assert here.processes(job.job_id) == []


@pytest.mark.core
def test_logs_and_status_of_a_job_outlive_its_place_and_the_rest_says_that_it_is_away(here: Here) -> None:
    if here.ground.gone is None:
        pytest.skip("this machine is never away from itself")
    ended, running = here.python("print('all of it')", name="ended"), here.waiting(name="running")
    here.run(ended)
    here.start(running, says="at work")
    here.ground.gone()
    try:
        status = here.backend.status(ended.job_id)
        assert (status.state, here.log(ended.job_id)) == ("succeeded", "all of it\n")
        assert here.log(running.job_id) == "at work\n"
        assert here.backend.status(running.job_id).state == "running", "its driver is heard through the store"
        assert {status.state for status in here.backend.list()} == {"succeeded", "running"}
        for verb in (
            lambda: here.backend.submit(here.python("pass", name="new")),
            lambda: here.backend.plan(here.python("pass", name="new")),
            lambda: here.backend.resubmit(ended.job_id),
        ):
            began = time.monotonic()
            with pytest.raises(ClusterError) as caught:
                verb()
            assert caught.value.exit_code == 3
            assert caught.value.hint
            assert time.monotonic() - began < AWAY_S
        assert here.runs.attempts(ended.job_id) == [1], "nothing was written"
        assert not here.runs.store.exists("jobs", here.python("pass", name="new").job_id)
    finally:
        here.ground.back()
    here.let_go()
    assert here.end(running.job_id).state == "succeeded"


def test_a_cancel_while_its_place_is_away_still_reaches_the_driver(here: Here) -> None:
    """Through the store, where it looks for it."""
    if here.ground.gone is None:
        pytest.skip("this machine is never away from itself")
    job = here.waiting()
    here.start(job)
    here.ground.gone()
    try:
        with contextlib.suppress(ClusterError):  # it cannot see that nothing is left
            here.backend.cancel(job.job_id)
        here.nothing_left(job.job_id)
    finally:
        here.ground.back()
    assert here.backend.cancel(job.job_id).state == "cancelled"


@pytest.mark.core
def test_what_clients_know_is_shown_nowhere(here: Here) -> None:
    """Not in the store, not in a command line, not in what the place shows."""
    job = here.waiting()
    here.start(job)
    lines = " ".join(word for process in here.processes(job.job_id) for word in process.cmdline())
    shown = repr(here.backend.place.observe([f"{job.job_id}-a1"])) + repr(here.backend.plan(job)) + lines
    here.backend.cancel(job.job_id)
    assert here.ground.secrets
    for secret in here.ground.secrets.values():
        assert secret not in shown
        assert secret.encode() not in here.everything()
