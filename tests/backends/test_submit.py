"""A job is started once, runs what it says, and ends as its command ended."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.cluster.jobs.models import JobStatus
from graftwork.errors import ConfigError, PreflightError
from tests.backends.local_target import Here, timeless

ORDER = ("submitted", "queued", "pending", "running", "succeeded")
CLOCK_S = 0.1
"""A store tells how old its files are: by its own clock, in its own grain."""
WORDS = (
    "two words",
    "it's",
    '"quoted"',
    "Ünïcode ✓ 漢",
    "line\nbreak",
    "$HOME",
    "`id`",
    "$(id)",
    "a;b && c | d > e",
    "*",
    "~",
    "\\n",
    "",
    "--target",
    "-c",
    "%s {x}",
)


@pytest.mark.core
def test_a_job_runs_to_its_end(here: Here) -> None:
    job = here.python("print('hello')")
    before = time.time()
    status = here.run(job)
    assert (status.job_id, status.attempt, status.state, status.exit_code) == (job.job_id, 1, "succeeded", 0)
    assert (status.kind, status.on) == ("exec", here.ground.on)
    assert status.submitted_at is not None
    assert status.started_at is not None
    assert status.ended_at is not None
    times = [before - CLOCK_S, status.submitted_at, status.started_at, status.ended_at, time.time() + CLOCK_S]
    assert times == sorted(times)
    assert here.log(job.job_id) == "hello\n"
    here.nothing_left(job.job_id)


def test_a_job_that_runs_is_found_by_who_submits_it_again(here: Here) -> None:
    job = here.waiting()
    first = here.start(job)
    again = here.backend.submit(job)
    assert (again.attempt, again.state) == (1, "running")
    assert again.started_at == pytest.approx(first.started_at, abs=1)
    here.let_go()
    assert here.end(job.job_id).state == "succeeded"
    assert here.log(job.job_id).count("at work") == 1


def test_a_job_that_has_ended_is_found_by_who_submits_it_again(here: Here) -> None:
    job = here.python("print('once')")
    ended = here.run(job)
    assert timeless(here.backend.submit(job)) == timeless(ended)
    assert here.runs.attempts(job.job_id) == [1]
    assert here.log(job.job_id) == "once\n"


def test_clients_that_submit_at_once_start_one_driver(here: Here) -> None:
    job, found = here.python("print('once')"), list[JobStatus]()
    gate = threading.Barrier(4)

    def submit() -> None:
        gate.wait()
        found.append(here.backend.submit(job))

    crew = [threading.Thread(target=submit) for _ in range(4)]
    for client in crew:
        client.start()
    for client in crew:
        client.join()
    assert {status.attempt for status in found} == {1}
    assert len(found) == 4
    assert here.end(job.job_id).state == "succeeded"
    assert here.log(job.job_id) == "once\n"
    assert here.runs.store.list("jobs", job.job_id, "a1", "starts") == ["1.json"]


def test_the_same_job_in_another_store_is_another_job(here: Here, tmp_path: Path) -> None:
    there = Here(here.ground, tmp_path / "other")
    first, second = here.python("print('first')"), there.python("print('first')")
    assert first.job_id == second.job_id
    here.backend.submit(first)
    if here.ground.on.startswith(
        "k8s:"
    ):  # an object's name is its job's: the other store's is refused, never taken for it
        with pytest.raises(PreflightError, match="E-NAME-TAKEN"):
            there.backend.submit(second)
        assert there.runs.job_ids() == []
        return
    there.backend.submit(second)
    assert here.end(first.job_id).state == "succeeded"
    assert there.end(second.job_id).state == "succeeded"
    assert here.log(first.job_id) == there.log(second.job_id) == "first\n"
    for place in (here, there):
        assert place.runs.store.list("jobs", first.job_id, "a1", "starts") == ["1.json"]


def test_its_states_follow_in_order(here: Here) -> None:
    job = here.python("import time; time.sleep(0.3)")
    states = [here.backend.submit(job).state]
    while states[-1] in ORDER[:4]:
        states.append(here.backend.status(job.job_id).state)
    places = [ORDER.index(state) for state in states]
    assert places == sorted(places), states
    assert states[-2:] == ["running", "succeeded"]


@pytest.mark.parametrize("code", [1, 2, 3, 77])
def test_its_exit_code_is_the_commands(here: Here, code: int) -> None:
    status = here.run(here.python(f"import sys; print('the reason'); sys.exit({code})"))
    assert (status.state, status.exit_code) == ("failed", code)
    assert "the reason" in status.why


def test_a_command_that_a_signal_ends_has_failed(here: Here) -> None:
    status = here.run(here.python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert status.state == "failed"
    assert status.exit_code not in (0, None)


def test_a_program_that_is_not_there_has_failed_and_is_named(here: Here) -> None:
    status = here.run(here.job("no-such-program-anywhere"))
    assert status.state == "failed"
    assert "no-such-program-anywhere" in status.why + here.log(status.job_id)


@pytest.mark.core
def test_arguments_arrive_as_they_are(here: Here) -> None:
    job = here.python("import json, sys; print(json.dumps(sys.argv[1:]))", *WORDS)
    assert here.run(job).state == "succeeded"
    assert json.loads(here.log(job.job_id)) == list(WORDS)


def test_a_command_knows_its_attempt_and_waits_for_no_input(here: Here) -> None:
    job = here.python("import os, sys; print(os.environ['GRAFTWORK_ATTEMPT']); print(repr(sys.stdin.read()))")
    assert here.run(job).state == "succeeded"
    told, read = here.log(job.job_id).splitlines()
    assert json.loads(told) == {"root": str(here.root), "job_id": job.job_id, "attempt": 1, "start": 1}
    assert read == "''"


def test_a_job_whose_client_was_killed_before_it_started_is_started_by_the_next(here: Here) -> None:
    job = here.python("print('after all')")
    here.runs.record(job, here.ground.on)
    here.runs.open_attempt(job.job_id, 1)
    assert here.backend.status(job.job_id).state == "submitted"
    assert here.run(job).state == "succeeded"
    assert here.runs.attempts(job.job_id) == [1]


def test_a_job_that_was_recorded_without_an_attempt_is_started_by_the_next(here: Here) -> None:
    job = here.python("print('after all')")
    here.runs.record(job, here.ground.on)
    assert here.run(job).state == "succeeded"


def test_an_unknown_job_is_named_with_where_to_look(here: Here) -> None:
    backend = here.backend
    verbs: list[Callable[[str], object]] = [
        backend.status,
        backend.cancel,
        backend.wait,
        backend.resubmit,
        lambda name: list(backend.logs(name)),
    ]
    for verb in verbs:
        with pytest.raises(ConfigError, match="no such job") as caught:
            verb("nobody-0123456789")
        assert "graftwork jobs ls" in caught.value.hint


def test_a_list_has_the_newest_first_and_this_place_alone(here: Here) -> None:
    jobs = [here.python("pass", str(number), name=f"job{number}") for number in range(3)]
    for job in jobs:
        here.backend.submit(job)
    elsewhere = here.python("pass", name="elsewhere")
    here.runs.record(elsewhere, "http://198.51.100.7:8265")
    here.runs.open_attempt(elsewhere.job_id, 1)
    assert [status.job_id for status in here.backend.list()] == [job.job_id for job in reversed(jobs)]
    for job in jobs:
        here.end(job.job_id)
    assert {status.state for status in here.backend.list()} == {"succeeded"}


def test_an_empty_store_has_no_jobs(here: Here) -> None:
    assert here.backend.list() == []


def test_a_job_of_another_place_is_not_started_here(here: Here) -> None:
    job = here.python("print('twice')")
    here.runs.record(job, "http://198.51.100.7:8265")
    here.runs.open_attempt(job.job_id, 1)
    with pytest.raises(ConfigError, match=r"198\.51\.100\.7"):
        here.backend.submit(job)
    with pytest.raises(ConfigError, match=r"198\.51\.100\.7"):
        here.backend.resubmit(job.job_id)


def test_this_python_runs_it(here: Here) -> None:
    """So that the other cases mean what they say: no container, no other machine."""
    job = here.python("import sys; print(sys.executable)")
    here.run(job)
    assert here.log(job.job_id).strip() == sys.executable
