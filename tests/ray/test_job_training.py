"""A training run as a job: what stops it leaves a checkpoint of its last step, and the next attempt goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.stages.jobs import job_of
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.checkpoint_resume import read_starts
from graftwork.training.run import run_paths
from graftwork.training.worker_messages import read_steps
from tests.jobs import end_all_jobs, local_backend, printed
from tests.training import task
from tests.waiting import until


@pytest.fixture(autouse=True)
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    yield
    end_all_jobs(str(tmp_path / "root"))


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2], ids=["in one process", "Ray Train"])
def test_a_stopped_run_goes_on_from_the_step_it_stopped_at(tmp_path: Path, workers: int) -> None:
    every = {"checkpoint_every": 100_000, "eval_every": 100_000}
    spec = task(tmp_path, num_workers=workers, **{"optim.epochs": 2000, **every})
    run, here = run_paths(spec), local_backend(spec.root)
    job = job_of(spec, ClusterSpec())
    here.submit(job)
    until(lambda: read_steps(run) and read_steps(run)[-1].step > 5, within_s=200)
    here.runs.ask_to_end(job.job_id, 1, "deadline")  # as the driver does when it is over
    ended = here.wait(job.job_id, timeout_s=120)
    assert (ended.state, ended.attempt) == ("stopped", 1), printed(spec.root, job.job_id)
    assert "deadline" in ended.why
    mark = Checkpoints(run).newest()
    assert mark is not None, printed(spec.root, job.job_id)
    assert mark.step == read_steps(run)[-1].step, "nothing was lost"
    assert f"the checkpoint of step {mark.step} is kept" in ended.why
    assert " of " in ended.progress
    assert "loss" in ended.progress

    assert here.resubmit(job.job_id).attempt == 2
    until(lambda: read_steps(run)[-1].step > mark.step + 5, within_s=120)
    assert here.cancel(job.job_id).state == "cancelled"
    assert [start["step"] for start in read_starts(run)] == [0, mark.step]
    second = Checkpoints(run).newest()
    assert second is not None
    assert second.step == read_steps(run)[-1].step > mark.step
    assert not here.place.observe([f"{job.job_id}-a2"]) or JobStore(spec.root).latest(job.job_id).ended is not None
