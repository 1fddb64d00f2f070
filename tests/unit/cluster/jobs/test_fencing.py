"""A later attempt, or a later start of the same one, takes over: what was told to nobody commits nothing."""

from collections import Counter
from pathlib import Path

import pytest

from graftwork.cluster.jobs.fencing import ENVIRONMENT, Fence, FenceMonitor, SupersededError
from graftwork.cluster.jobs.store import JobStore
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import AsyncCheckpointSaver, CheckpointMark, Checkpoints
from graftwork.training.spec import CheckpointSpec
from graftwork.training.worker_messages import StepLog
from graftwork.tuning.trial_store import TRIALS_FILE, Ledger
from tests.jobs import command_job
from tests.waiting import until


@pytest.fixture
def fence(tmp_path: Path) -> Fence:
    job = command_job(str(tmp_path), ["true"])
    runs = JobStore(str(tmp_path))
    runs.record(job, "local")
    runs.open_attempt(job.job_id, 1)
    runs.store.write_json({}, "jobs", job.job_id, "a1", "starts", "1.json")
    return Fence(str(tmp_path), job.job_id, 1, 1)


def overtake(fence: Fence, how: str) -> None:
    runs = JobStore(fence.root)
    if how == "attempt":
        runs.open_attempt(fence.job_id, 2)
    else:
        runs.store.write_json({}, *fence.folder, "starts", "2.json")


@pytest.mark.parametrize("how", ["attempt", "start"])
def test_who_is_overtaken_is_told_and_refused(fence: Fence, how: str) -> None:
    assert fence.stop_reason() is None
    fence.require()
    overtake(fence, how)
    assert fence.stop_reason() == "superseded"
    with pytest.raises(SupersededError, match="a later one has taken over"):
        fence.require()


def test_words_of_the_store(fence: Fence) -> None:
    runs = JobStore(fence.root)
    runs.store.write_json({}, *fence.folder, "leave", "2.json")
    assert fence.stop_reason() is None, "another machine leaves"
    runs.store.write_json({}, *fence.folder, "leave", "1.json")
    assert fence.stop_reason() == "leave"
    runs.ask_to_end(fence.job_id, 1, "deadline")
    lookout = FenceMonitor(fence)
    assert until(lambda: lookout.stop_reason) == "cancel"


@pytest.mark.parametrize("how", ["attempt", "start"])
def test_a_stale_attempt_commits_no_checkpoint(fence: Fence, tmp_path: Path, how: str) -> None:
    import torch
    from safetensors.torch import save_file

    run = RunPaths(Store(fence.root), "run", "0" * 64)
    checkpoints = Checkpoints(run)
    saver = AsyncCheckpointSaver(checkpoints, CheckpointSpec(), Counter(), StepLog(run), fence, sends=True)
    for step in (1, 2):
        checkpoints.folder(step).mkdir(parents=True)
        save_file({"w": torch.ones(2)}, checkpoints.folder(step) / "adapter_model.safetensors")
    saver.save(CheckpointMark(1, 1.0, 1))
    saver.wait()
    overtake(fence, how)
    saver.save(CheckpointMark(2, 2.0, 1))
    with pytest.raises(SupersededError):
        saver.wait()
    assert [mark.step for mark in checkpoints.marks()] == [1]
    saver.close()


def test_a_stale_sweep_writes_no_trials(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, fence.dump())
    run = RunPaths(Store(fence.root), "sweep", "0" * 64)
    ledger = Ledger(run)
    ledger.write()
    before = run.store.read_bytes(*run.file(TRIALS_FILE))
    overtake(fence, "attempt")

    def refused() -> bool:
        try:
            ledger.write()
        except SupersededError:
            return True
        return False

    until(refused, within_s=10)
    assert run.store.read_bytes(*run.file(TRIALS_FILE)) == before
