"""A run whose folder lies on S3: checkpoints, metrics and the lock survive the machine."""

import json
import time
from pathlib import Path

import pytest

from graftwork.errors import RunError
from graftwork.storage import RunPaths, Store
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.data import prepare
from graftwork.training.job import TrainJob
from graftwork.training.lock import DEAD_AFTER_S, LOCK, run_lock
from graftwork.training.loop import run_steps
from graftwork.training.steplog import StepReport, read_steps
from tests.training import task


class Killed(Exception):
    """Stands for the death of the process."""


def test_a_killed_run_goes_on_from_s3_on_another_machine(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = task(tmp_path, **{"root": s3_store.uri, "adapter.dropout": 0.1})
    run = RunPaths(s3_store, "colours", "0" * 64)
    job = TrainJob(spec, prepare(spec), run)

    def die_at_seven(report: StepReport) -> bool:
        if report.step == 7:
            raise Killed
        return True

    with pytest.raises(Killed):
        run_steps(job, die_at_seven)
    assert [known.step for known in read_steps(run)] == [1, 2, 3, 4], "written at the checkpoint"
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "another-machine"))
    result = run_steps(job, lambda _: True)
    undisturbed = run_steps(TrainJob(spec, job.data), lambda _: True)
    assert result.train_loss == undisturbed.train_loss
    # SeaweedFS goes on listing a prefix whose objects are all deleted, so ask for what is there.
    names = s3_store.list(*run.checkpoints())
    assert [n for n in names if s3_store.exists(*run.checkpoints(n))] == ["checkpoint-12", "checkpoint-8"]
    with Checkpoints(run).adapter(12) as folder:
        assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_lock_is_refused_while_its_owner_lives_and_taken_over_when_it_is_dead(s3_store: Store) -> None:
    run = RunPaths(s3_store, "colours", "1" * 64)
    with run_lock(run), pytest.raises(RunError, match="another process is running it"), run_lock(run):
        pass
    dead = {"owner": "gone", "renewed_at": time.time() - 2 * DEAD_AFTER_S}
    s3_store.write_bytes(json.dumps(dead).encode(), *run.file(LOCK))
    with run_lock(run):
        assert s3_store.read_json(*run.file(LOCK))["owner"] != "gone"
    assert not s3_store.exists(*run.file(LOCK))
