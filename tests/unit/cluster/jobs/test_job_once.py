"""However often, from wherever and however rudely a job is submitted: one attempt, one driver."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from graftwork.cluster.jobs.backend import StoredBackend
from graftwork.cluster.jobs.fencing import ENVIRONMENT
from graftwork.cluster.jobs.models import Job
from tests.jobs import command_job, end_all_jobs, local_backend
from tests.process_races import die_at, fork_race
from tests.waiting import until

SLEEPS = ("sleep", "600")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    yield
    for root in tmp_path.glob("root*"):
        end_all_jobs(str(root))


def commands(job: Job) -> list[int]:
    """Processes that run the job's command, found by the mark of their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == list(SLEEPS):
            mark = json.loads(process.environ().get(ENVIRONMENT, "{}"))
            found += [process.pid] if (mark.get("root"), mark.get("job_id")) == (job.root, job.job_id) else []
    return found


def require_one(here: StoredBackend, job: Job, attempt: int = 1) -> None:
    """One attempt after the others, one driver, one command."""
    until(lambda: here.status(job.job_id).state == "running")
    until(lambda: commands(job))
    assert here.runs.attempts(job.job_id) == list(range(1, attempt + 1))
    assert here.runs.store.list("jobs", job.job_id, f"a{attempt}", "starts") == ["1.json"]
    assert len(commands(job)) == 1
    assert here.cancel(job.job_id).state == "cancelled"
    assert commands(job) == [], "an orphan"


def submits(root: str, job: Job, times: int) -> Callable[[], object]:
    return lambda: sorted({local_backend(root).submit(job).attempt for _ in range(times)})


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("clients", "times"),
    [pytest.param(6, 10, marks=pytest.mark.long), pytest.param(20, 50, marks=pytest.mark.soak)],
)
def test_submits_at_once_make_one_job(tmp_path: Path, clients: int, times: int) -> None:
    root = str(tmp_path / "root")
    job = command_job(root, SLEEPS)
    outcomes = fork_race([submits(root, job, times)] * clients)
    assert outcomes == [{"done": [1]}] * clients
    require_one(local_backend(root), job)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("clients", [pytest.param(4, marks=pytest.mark.long), pytest.param(20, marks=pytest.mark.soak)])
def test_resubmits_at_once_make_one_attempt(tmp_path: Path, clients: int) -> None:
    root = str(tmp_path / "root")
    job, here = command_job(root, SLEEPS), local_backend(root)
    here.submit(job)
    here.cancel(job.job_id)
    outcomes = fork_race([lambda: local_backend(root).resubmit(job.job_id).attempt] * clients)
    done = [outcome["done"] for outcome in outcomes if "done" in outcome]
    assert done, outcomes
    assert set(done) == {2}
    refused = [outcome for outcome in outcomes if "done" not in outcome]
    assert all(outcome["error"] == "ConfigError" for outcome in refused), "it runs already"
    require_one(here, job, attempt=2)


@pytest.mark.usefixtures("cache")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "moments",
    [pytest.param((14, 40), marks=pytest.mark.long), pytest.param(range(1, 200), marks=pytest.mark.soak)],
    ids=["few", "all"],
)
def test_a_client_killed_at_any_point_leaves_a_job_that_the_next_submit_finds(
    tmp_path: Path, moments: tuple[int, ...] | range
) -> None:
    died = 0
    for moment in moments:
        root = str(tmp_path / f"root{moment}")
        job, here = command_job(root, SLEEPS), local_backend(root)
        killed = die_at(moment, lambda here=here, job=job: here.submit(job).attempt)  # type: ignore[misc]
        assert here.submit(job).attempt == 1
        require_one(here, job)
        died += killed
        if not killed:
            break
    print(f"killed at {died} points")
    assert died >= (20 if isinstance(moments, range) else len(moments))
