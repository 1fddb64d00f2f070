"""A single worker of this machine: a child process whose steps, checkpoints and endings are those of Ray Train's."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from graftwork.cluster.session import Session
from graftwork.errors import ClusterError, Interrupted
from graftwork.storage.store import RunPaths
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.checkpoint_resume import read_starts
from graftwork.training.local_worker import COMMAND, MAX_FAILURES, needs_ray_train
from graftwork.training.ray_worker import fit
from graftwork.training.run import ResolvedRun, run_paths, train
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob, read_steps
from tests.process_races import ROOT
from tests.training import task
from tests.waiting import until

WITHIN_S = 120.0
STEPS = 60
PROGRAM = """
import json, sys
from graftwork.cluster.session import session
from graftwork.errors import GraftworkError
from graftwork.training.local_worker import needs_ray_train
from graftwork.training.run import train
from graftwork.training.spec import TrainSpec
try:
    with session("local", needs_ray=False):
        report = train(TrainSpec.model_validate_json(sys.argv[1]))
    print(json.dumps({"losses": report.train_loss, "version": report.version, "ray": "ray" in sys.modules}))
except GraftworkError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
    sys.exit(100 + error.exit_code)
"""
"""As `graftwork train` runs a spec of one worker."""


def one_worker(folder: Path, **changes: Any) -> TrainSpec:
    """60 steps with dropout, so that a random state that differs shows in the losses; a checkpoint every 10."""
    usual = {"num_workers": 1, "adapter.dropout": 0.1, "checkpoint_every": 10, "eval_every": 20, "alias": None}
    return task(folder, **{**usual, "optim.epochs": STEPS / 6, **changes})


def start_driver(spec: TrainSpec) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "OMP_NUM_THREADS"):
        environment.pop(key, None)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, spec.model_dump_json()],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def outcome_of(driver: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = driver.communicate(timeout=WITHIN_S)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def worker_of(pid: int) -> psutil.Process | None:
    """The child process that trains for the process `pid`."""
    for process in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if COMMAND in process.cmdline():  # another child shows the driver's words until it has called exec
                return process
    return None


def last_step(run: RunPaths) -> int:
    steps = read_steps(run)
    return steps[-1].step if steps else 0


def adapters(run: RunPaths) -> dict[int, bytes]:
    """Bytes of the adapter in each kept checkpoint, by step."""
    checkpoints = Checkpoints(run)
    return {
        mark.step: (checkpoints.folder(mark.step) / "adapter_model.safetensors").read_bytes()
        for mark in checkpoints.marks()
    }


def fitted(spec: TrainSpec, *, ray_train: bool) -> tuple[LoopResult, dict[int, bytes]]:
    run = ResolvedRun.resolve(spec).with_auto_resolved()
    result = fit(TrainJob(run.spec, run.data, run.paths), ray_train=ray_train)
    return result, adapters(run.paths)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of a run that nothing disturbs, without a Ray, and the bytes of its last checkpoint's adapter."""
    spec = one_worker(tmp_path_factory.mktemp("undisturbed"))
    found = outcome_of(start_driver(spec))
    return {**found, "adapter": adapters(run_paths(spec))[STEPS]}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_steps_and_adapter_equal_those_of_a_ray_train_worker_bit_for_bit(
    ray_cluster: Session, tmp_path: Path, strategy: str
) -> None:
    changes = {"optim.epochs": 4, "strategy": {"kind": strategy}}
    alone, of_alone = fitted(one_worker(tmp_path / "alone", **changes), ray_train=False)
    placed, of_placed = fitted(one_worker(tmp_path / "placed", **changes), ray_train=True)
    assert alone.train_loss == placed.train_loss
    assert alone.eval_loss == placed.eval_loss
    assert sorted(of_alone) == [20, 24]
    assert of_alone == of_placed
    assert alone.notes == placed.notes


def test_a_run_of_one_worker_imports_no_ray(undisturbed: dict[str, Any]) -> None:
    assert len(undisturbed["losses"]) == STEPS
    assert not undisturbed["ray"]


@pytest.mark.long
def test_a_killed_driver_takes_its_worker_along_and_the_rerun_ends_bit_equal(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    spec = one_worker(tmp_path)
    run = run_paths(spec)
    driver = start_driver(spec)
    until(lambda: last_step(run) > 25, "step 25 is passed", driver, within_s=WITHIN_S)
    worker = worker_of(driver.pid)
    assert worker is not None
    driver.kill()
    driver.communicate()
    assert psutil.wait_procs([worker], timeout=10)[1] == [], "a worker without a driver ends"
    assert last_step(run) < STEPS, "killed in the middle"
    again = outcome_of(start_driver(spec))
    assert [start["step"] for start in read_starts(run)][1] in (20, 30, 40, 50)
    assert again["losses"] == undisturbed["losses"]
    assert adapters(run)[STEPS] == undisturbed["adapter"]


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_the_run_ends_bit_equal(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    spec = one_worker(tmp_path)
    run = run_paths(spec)
    driver = start_driver(spec)
    until(lambda: last_step(run) > 25, "step 25 is passed", driver, within_s=WITHIN_S)
    worker = worker_of(driver.pid)
    assert worker is not None
    worker.kill()
    found = outcome_of(driver)
    assert len(read_starts(run)) == 2
    assert found["losses"] == undisturbed["losses"]
    assert adapters(run)[STEPS] == undisturbed["adapter"]


@pytest.mark.long
def test_a_worker_that_gets_sigterm_saves_at_its_step_and_another_goes_on(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    spec = one_worker(tmp_path, checkpoint_every=1000)
    run = run_paths(spec)
    driver = start_driver(spec)
    until(lambda: last_step(run) > 5, "step 5 is passed", driver, within_s=WITHIN_S)
    worker = worker_of(driver.pid)
    assert worker is not None
    worker.terminate()
    found = outcome_of(driver)
    [_, second] = read_starts(run)
    assert 5 < int(str(second["step"])) < STEPS, "saved between two intervals"
    assert found["losses"] == undisturbed["losses"]


@pytest.mark.long
def test_ctrl_c_names_the_checkpoint_leaves_no_process_and_the_rerun_ends_bit_equal(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    spec = one_worker(tmp_path)
    run = run_paths(spec)
    driver = start_driver(spec)
    until(lambda: Checkpoints(run).newest(), "a checkpoint is committed", driver, within_s=WITHIN_S)
    below = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal sends it: to the worker as well
    said = outcome_of(driver)
    assert driver.returncode == 100 + Interrupted.exit_code
    assert said["error"] == "Interrupted"
    kept = re.search(r"the checkpoint of step (\d+) is kept", said["text"])
    assert kept is not None
    assert int(kept[1]) in range(10, STEPS, 10)
    assert "run the same command" in said["text"]
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert run.store.read_json(*run.status())["state"] == "interrupted"
    assert outcome_of(start_driver(spec))["losses"] == undisturbed["losses"]


@pytest.mark.long
def test_a_worker_that_dies_again_and_again_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    spec = one_worker(tmp_path)
    driver, killed = start_driver(spec), set[int]()
    while driver.poll() is None:
        worker = worker_of(driver.pid)
        if worker is not None and worker.pid not in killed:
            killed.add(worker.pid)
            worker.kill()
        time.sleep(0.01)
    said = outcome_of(driver)
    assert len(killed) == MAX_FAILURES + 1
    assert said["error"] == "RunError"
    assert "its worker failed: it ended with signal 9 (SIGKILL)" in said["text"]
    assert "Rule: lost workers are replaced while checkpoints are made" in said["text"]
    assert "Hint: run the same command" in said["text"]


@pytest.mark.long
def test_a_worker_has_the_threads_and_the_reservation_of_its_spec(ray_cluster: Session, tmp_path: Path) -> None:
    """In a private Ray: what the worker uses is no more to be had by others, and is given back at the end."""
    before = os.environ.pop("OMP_NUM_THREADS", None)
    spec = one_worker(
        tmp_path, cpus_per_worker=2, **{"optim.epochs": 4}
    )  # two threads wait for each other on two cores
    seen: list[tuple[str | None, float, int]] = []

    def look() -> None:
        worker = worker_of(os.getpid())
        if worker is not None:
            with contextlib.suppress(psutil.Error):
                threads = worker.environ().get("OMP_NUM_THREADS")
                seen.append((threads, ray.available_resources().get("CPU", 0.0), worker.nice()))

    try:
        run = ResolvedRun.resolve(spec).with_auto_resolved()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(fit, TrainJob(run.spec, run.data, run.paths))
            until(lambda: last_step(run.paths) > 2 or running.done(), "the run takes steps", within_s=WITHIN_S)
            look()
            assert running.result().steps == 24
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    assert seen == [("2", 2.0, ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote()))]
    until(lambda: ray.available_resources().get("CPU") == 4.0, "the reservation is given back", within_s=WITHIN_S)


def test_one_worker_is_ray_trains_where_the_process_works_on_a_ray_of_others(
    ray_cluster: Session, tmp_path: Path
) -> None:
    """A task of the Ray stands for the driver of a job: it has joined a Ray that it has not started."""
    spec = one_worker(tmp_path)
    assert not needs_ray_train(spec), "this process has started its Ray"
    assert ray.get(ray.remote(num_cpus=0)(needs_ray_train).remote(spec))


def test_a_worker_larger_than_the_machine_is_refused_at_once(tmp_path: Path) -> None:
    said = outcome_of(start_driver(one_worker(tmp_path, cpus_per_worker=1000)))
    assert said["error"] == ClusterError.__name__
    assert "this machine has" in said["text"]
    assert "CPU, the run needs 1000" in said["text"]


def test_workers_that_never_fit_are_refused_at_once(ray_cluster: Session, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="the cluster has 4 CPU, the run needs 6") as caught:
        train(task(tmp_path, **{"num_workers": 2, "cpus_per_worker": 3.0}))
    assert "--set num_workers=1" in caught.value.hint
