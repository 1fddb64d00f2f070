"""A run whose folder lies on S3: checkpoints, metrics and the lock survive the machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.errors import Interrupted, RunError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import CheckpointLost, Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.run import ResolvedRun, train_resolved
from graftwork.training.run_lock import DEAD_AFTER_S, LOCK, run_lock
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob, read_steps
from tests.process_races import ROOT
from tests.s3.conftest import use
from tests.s3_server import S3Server
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
    with Checkpoints(run).model_files(12) as folder:
        assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def own_s3_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    """A server of this test's own, which may be killed."""
    server = S3Server()
    try:
        server.start()
        use(server, monkeypatch, tmp_path)
        yield server
    finally:
        server.remove()


@pytest.mark.long
def test_an_outage_only_delays_and_a_longer_one_names_the_last_checkpoint(
    own_s3_server: S3Server, tmp_path: Path
) -> None:
    """The server is killed after step 5, in the upload of step 4 or after it, and comes back once step 8 is uploaded.

    Then it is killed for good.
    """
    spec = task(tmp_path, **{"root": f"s3://{own_s3_server.bucket}/root", "checkpoints.outage_s": 60})
    store = Store(spec.root).with_retries(60)
    run = RunPaths(store, "colours", "0" * 64)
    job = TrainJob(spec, prepare(spec), run)
    back: list[threading.Thread] = []

    def kill_at_five(report: StepReport) -> bool:
        if report.step == 5:
            own_s3_server.kill()
        if report.step == 8:
            back.append(threading.Thread(target=own_s3_server.start))
            back[0].start()
        return True

    result = run_steps(job, kill_at_five)
    back[0].join()
    assert [step for step, _ in result.train_loss] == list(range(1, 13))
    assert [mark.step for mark in Checkpoints(run).marks()] == [8, 12]

    hurried = replace(job, spec=spec.with_({"checkpoints.outage_s": 1}), run=replace(run, store=store.with_retries(1)))
    assert hurried.run is not None
    for mark in Checkpoints(run).marks()[1:]:
        Checkpoints(run).drop(mark.step)

    def kill_at_nine(report: StepReport) -> bool:
        if report.step == 9:
            own_s3_server.kill()
        return True

    with pytest.raises(CheckpointLost, match="the checkpoint of step 8 is the last complete one") as caught:
        run_steps(hurried, kill_at_nine)
    assert "checkpoints.outage_s=1 seconds" in caught.value.rule
    assert "cannot be reached" in caught.value.problem
    assert "continues from step 8" in caught.value.hint


def test_ctrl_c_in_an_outage_ends_at_once_and_stays_interrupted(own_s3_server: S3Server, tmp_path: Path) -> None:
    """The store is out of reach for longer than anyone waits after Ctrl-C; the driver would wait outage_s for it."""
    changes = {"root": f"s3://{own_s3_server.bucket}/root", "num_workers": 1, "checkpoints.outage_s": 120}
    run = ResolvedRun.resolve(task(tmp_path, **changes))
    pressed: list[float] = []

    def interrupt(_job: TrainJob) -> LoopResult:
        own_s3_server.kill()
        pressed.append(time.monotonic())
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="could not be listed") as caught:
        train_resolved(run, workers=interrupt)
    assert time.monotonic() - pressed[0] < 60
    assert "cannot be reached" in caught.value.problem


def test_the_lock_is_refused_while_its_owner_lives_and_taken_over_when_it_is_dead(s3_store: Store) -> None:
    run = RunPaths(s3_store, "colours", "1" * 64)
    with run_lock(run), pytest.raises(RunError, match="another process is running it"), run_lock(run):
        pass
    dead = {"owner": "gone", "renewed_at": time.time() - 2 * DEAD_AFTER_S}
    s3_store.write_bytes(json.dumps(dead).encode(), *run.file(LOCK))
    with run_lock(run):
        assert s3_store.read_json(*run.file(LOCK))["owner"] != "gone"
    assert not s3_store.exists(*run.file(LOCK))


def test_a_lock_whose_owner_died_on_this_machine_is_taken_over_at_once(s3_store: Store) -> None:
    program = (
        "import os, sys\n"
        "from graftwork.storage.store import RunPaths, Store\n"
        "from graftwork.training.run_lock import run_lock\n"
        "with run_lock(RunPaths(Store(sys.argv[1]), 'colours', '2' * 64)):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, s3_store.uri], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    run = RunPaths(s3_store, "colours", "2" * 64)
    assert s3_store.exists(*run.file(LOCK)), "left behind"
    with run_lock(run):
        assert s3_store.read_json(*run.file(LOCK))["process"] == os.getpid()
