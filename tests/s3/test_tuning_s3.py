"""A sweep's TensorBoard logs where its root is in S3."""

from dataclasses import replace

from graftwork.storage.store import RunPaths, Store
from graftwork.tuning.tensorboard import EventLogs
from graftwork.tuning.trials import TrialRecord


def test_logs_are_uploaded_when_their_trial_has_ended(s3_store: Store) -> None:
    run = RunPaths(s3_store, "sweep", "0" * 64)
    logs = EventLogs(run, began=1_700_000_000.0)
    began = TrialRecord("aaaa1111", {"optim.lr": 0.004}, losses=((2, 1.5),), steps=2, state="running")
    logs.follow([began])
    assert not s3_store.exists(*run.file("tensorboard", "aaaa1111"))
    logs.follow([replace(began, state="stopped"), replace(began, trial_id="bbbb2222")])
    (name,) = s3_store.list(*run.file("tensorboard", "aaaa1111"))
    local = s3_store.local_dir(*run.file("tensorboard", "aaaa1111"), name)
    assert s3_store.read_bytes(*run.file("tensorboard", "aaaa1111", name)) == local.read_bytes()
    logs.close()
    assert s3_store.list(*run.file("tensorboard", "bbbb2222"))
