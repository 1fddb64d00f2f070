"""Runs under Ray Train: two real workers that are killed, a driver that is killed, one adapter published."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from graftwork.artifacts.registry import open_adapter, resolve, verify_adapter
from graftwork.cluster.session import Session
from graftwork.errors import Interrupted, RunError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.report import Progress, TrainReport
from graftwork.training.run import run_paths, train
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob, read_steps
from tests.process_races import ROOT
from tests.training import task
from tests.waiting import until

pytestmark = pytest.mark.long
WITHIN_S = 240.0
STEPS = 120
ENDED_BY_ITSELF = 100
"""Added to a driver's exit code: Ray ends a process whose thread calls it after its shutdown with 1, as we do."""


def last_step(run: RunPaths) -> int:
    steps = read_steps(run)
    return steps[-1].step if steps else 0


def start_driver(spec: TrainSpec) -> subprocess.Popen[str]:
    """A process that trains `spec` on a private Ray of its own."""
    program = (
        "import sys, json\n"
        "from graftwork.cluster.session import session\n"
        "from graftwork.errors import GraftworkError\n"
        "from graftwork.training.run import train\n"
        "from graftwork.training.spec import TrainSpec\n"
        "try:\n"
        "    with session('local', num_cpus=4):\n"
        "        train(TrainSpec.model_validate_json(sys.argv[1]))\n"
        "except GraftworkError as error:\n"
        "    print(error)\n"
        f"    sys.exit({ENDED_BY_ITSELF} + error.exit_code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        environment.pop(key, None)
    return subprocess.Popen(
        [sys.executable, "-c", program, spec.model_dump_json()], env=environment, text=True, stdout=subprocess.PIPE
    )


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes below this one."""
    return [process for process in psutil.Process().children(recursive=True) if "TrainWorker" in command_of(process)]


def command_of(process: psutil.Process) -> str:
    """Its command line; empty for one that ended since it was listed (a zombie included)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def kill_a_worker(run: RunPaths, step: int) -> str:
    """Kill one of the two workers once `step` is noted, while the run goes on. Returns what ran then."""
    until(lambda: len(train_workers()) == 2, "both workers are seen", within_s=WITHIN_S)
    worker = train_workers()[-1]
    until(lambda: last_step(run) >= step, f"step {step} is noted", within_s=WITHIN_S)
    assert last_step(run) < STEPS, "the run goes on"
    running = " ".join(command_of(process) for process in psutil.Process().children(recursive=True))
    worker.kill()
    return running


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    every = {"checkpoint_every": 20, "eval_every": 30}
    return task(tmp_path_factory.mktemp("train"), **{"optim.epochs": STEPS / 6, "alias": "prod", **every})


@dataclass(frozen=True)
class Disturbed:
    """A run whose driver got Ctrl-C with a checkpoint made, then SIGKILL past step 45; then a worker died past 65."""

    said_on_ctrl_c: str
    code_on_ctrl_c: int
    left_running: list[psutil.Process]
    refused_beside: str
    status_after_ctrl_c: str
    steps_when_killed: int
    told: list[Progress]
    report: TrainReport
    running: str
    """Command lines of the processes at work in the last run."""


@pytest.fixture(scope="module")
def disturbed(ray_cluster: Session, spec: TrainSpec) -> Disturbed:
    run = run_paths(spec)
    driver = start_driver(spec)
    until(
        lambda: Checkpoints(run).newest() or driver.poll() is not None,
        "the first driver commits a checkpoint",
        within_s=WITHIN_S,
    )
    below = psutil.Process(driver.pid).children(recursive=True)
    with pytest.raises(RunError) as refused:
        train(spec)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=200)
    left_running = psutil.wait_procs(below, timeout=60)[1]
    status = run.store.read_json(*run.status())["state"]

    second = start_driver(spec)
    until(
        lambda: last_step(run) >= 45 or second.poll() is not None, "the second driver passes step 45", within_s=WITHIN_S
    )
    second.kill()
    second.wait()
    steps_when_killed = last_step(run)

    told: list[Progress] = []
    with ThreadPoolExecutor(1) as beside:
        killing = beside.submit(kill_a_worker, run, 65)
        report = train(spec, on_progress=told.append)
        running = killing.result()
    return Disturbed(
        said, driver.returncode, left_running, str(refused.value), status, steps_when_killed, told, report, running
    )


@pytest.mark.timeout(600)
def test_the_curve_is_that_of_an_undisturbed_run_on_one_worker(spec: TrainSpec, disturbed: Disturbed) -> None:
    """Killed or not, one worker or two: every step sees the same rows, and each trained token weighs the same."""
    report = disturbed.report
    undisturbed = run_steps(TrainJob(spec, prepare(spec)), lambda _: True)
    assert [step for step, _ in report.train_loss] == list(range(1, STEPS + 1))
    assert dict(report.train_loss) == pytest.approx(dict(undisturbed.train_loss), rel=1e-3)
    assert dict(report.eval_loss) == pytest.approx(dict(undisturbed.eval_loss), rel=1e-3)
    assert report.tokens == undisturbed.tokens
    assert len(report.peak_rss_bytes_per_worker) == 2


def test_output_and_report_compare_the_peak_with_the_plan_that_was_stored(
    spec: TrainSpec, disturbed: Disturbed
) -> None:
    run, report = run_paths(spec), disturbed.report
    predicted = run.store.read_json(*run.plan())["plan"]["peak_bytes_per_process"]
    [row] = run.store.read_json(*run.file("report.json"))["plan"]
    most = max(report.peak_rss_bytes_per_worker)
    assert (row["predicted_bytes"], row["actual_bytes"]) == (predicted, most)
    [note] = [note for note in report.notes if note.startswith("memory of a worker")]
    assert f"{predicted / 2**30:.2f} GiB predicted, {most / 2**30:.2f} GiB at the peak" in note


def test_every_start_goes_on_from_a_checkpoint(disturbed: Disturbed) -> None:
    assert 45 <= disturbed.steps_when_killed < STEPS, "killed in the middle"
    assert disturbed.told[0].step > 40, "the third driver went on from the checkpoint of step 40"
    assert disturbed.told[-1].step == disturbed.told[-1].total_steps == STEPS
    assert disturbed.told[-1].eval_loss == disturbed.report.eval_loss[-1][1]


def test_ctrl_c_keeps_the_checkpoint_says_how_to_go_on_and_leaves_nothing_running(disturbed: Disturbed) -> None:
    assert disturbed.code_on_ctrl_c == ENDED_BY_ITSELF + Interrupted.exit_code
    assert "Interrupted" in disturbed.said_on_ctrl_c
    kept = re.search(r"the checkpoint of step (\d+) is kept", disturbed.said_on_ctrl_c)
    assert kept is not None
    assert int(kept[1]) in range(20, STEPS, 20), "20, or a later one: the workers go on until the signal is seen"
    assert "run the same command" in disturbed.said_on_ctrl_c
    assert disturbed.left_running == []
    assert disturbed.status_after_ctrl_c == "interrupted"


def test_a_second_process_is_refused_while_a_run_goes_on(disturbed: Disturbed) -> None:
    assert "another process is running it" in disturbed.refused_beside


def test_no_helper_with_nothing_to_do_is_started(disturbed: Disturbed) -> None:
    assert "TrainController" in disturbed.running
    assert not [name for name in ("DatasetManager", "PlacementGroupCleaner") if name in disturbed.running]


def test_the_adapter_is_published_under_its_alias(spec: TrainSpec, disturbed: Disturbed) -> None:
    report, store = disturbed.report, Store(spec.root)
    manifest = resolve(store, "colours@prod")
    assert f"colours@{manifest.version}" == report.adapter
    assert verify_adapter(store, "colours", report.version) == []
    assert manifest.metrics["eval_loss"] == pytest.approx(report.eval_loss[-1][1])
    assert manifest.run == report.run_id


def test_a_finished_run_is_reused_whatever_its_workers(spec: TrainSpec, disturbed: Disturbed) -> None:
    again = train(spec.with_({"num_workers": 1}))
    assert again.reused
    assert replace(again, reused=False) == disturbed.report
    run = run_paths(spec)
    assert run.store.read_json(*run.status())["state"] == "finished"


def test_relative_places_mean_the_drivers_folder(
    spec: TrainSpec, disturbed: Disturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train moves its workers elsewhere; base, root and the adapter gone on from are found all the same."""
    monkeypatch.chdir(Path(spec.root).parent)
    near = {"root": "root", "base": "base", "data.train": "train.jsonl", "data.eval": "eval.jsonl", "num_workers": 1}
    report = train(spec.with_({**near, "init_from": "colours@prod", "optim.epochs": 0.5, "alias": None}))
    assert open_adapter(Store(spec.root), "colours", report.version).parent == disturbed.report.version
    assert report.train_loss[0][1] == pytest.approx(disturbed.report.train_loss[-1][1], rel=0.5)
