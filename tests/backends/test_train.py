"""A stage of ours as a job: it trains as it does in the foreground, and when it is cancelled its Ray goes too."""

from pathlib import Path

from graftwork.cluster.jobs.models import Job
from graftwork.stages.jobs import job_of
from tests.backends.local_target import Here
from tests.training import task

TRAINED_S = 240.0


def training(here: Here, folder: Path, **changes: object) -> Job:
    """With base and rows as the place's own files: pods read no folder of the machine that submits."""
    spec = task(folder, root=str(here.root), **changes)
    own = {"base.uri": spec.base.uri, "data.train": spec.data.train, "data.eval": spec.data.eval}
    return job_of(spec.with_({key: f"file://{path}" for key, path in own.items()}), here.ground.cluster)


def test_a_training_run_is_a_job(here: Here, tmp_path: Path) -> None:
    job = training(here, tmp_path / "task")
    here.backend.submit(job)
    ended = here.until(job.job_id, lambda status: status.ended, TRAINED_S)
    assert ended.state == "succeeded", here.log(job.job_id)
    assert (ended.kind, ended.exit_code) == ("train", 0)
    assert list(here.root.glob("adapters/*/*/manifest.json"))
    here.nothing_left(job.job_id)


def test_a_training_run_that_is_cancelled_leaves_no_ray(here: Here, tmp_path: Path) -> None:
    job = training(here, tmp_path / "task", **{"optim.epochs": 500})
    here.backend.submit(job)
    status = here.until(job.job_id, lambda status: status.ended or " of " in status.progress, TRAINED_S)
    assert status.state == "running", here.log(job.job_id)
    assert here.backend.cancel(job.job_id).state == "cancelled"
    assert here.processes(job.job_id) == []
    assert not list(here.root.glob("adapters/*/*/manifest.json"))
