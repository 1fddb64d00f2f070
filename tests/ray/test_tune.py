"""Sweeps on a private Ray and a tiny base: real trials of the real loop, each in its own process."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.util import placement_group_table

from graftwork.adapters.lora import LoraSpec
from graftwork.artifacts.manifest import aliases
from graftwork.artifacts.registry import open_adapter
from graftwork.cluster.session import Session, session
from graftwork.errors import ClusterError, Interrupted, RunError
from graftwork.storage.store import Store
from graftwork.training.run_lock import run_lock
from graftwork.tuning.run import Sweep, tune
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TuneProgress, TuneReport
from tests.tiny import write_tiny_base
from tests.waiting import until

FREED_WITHIN_S = 90.0
FIRST_LOSS_WITHIN_S = 240.0
GOOD = 0.03
"""The learning rate that wins wherever it is tried: four steps at a small one hardly move a random model."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path) -> Path:
    """A folder with a base, train.jsonl and eval.jsonl."""
    write_tiny_base(folder / "base")
    for part, first in (("train", 0), ("eval", 100)):
        rows = [
            {"prompt": f"airport {n}", "completion": json.dumps({"icao": f"Z{n}"})} for n in range(first, first + 12)
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sweep(inputs: Path, root: Path, space: Mapping[str, Any], **keys: Any) -> TuneSpec:
    train = {
        "name": "tiny",
        "base": str(inputs / "base"),
        "quant": {"kind": "none"},
        "data": {"train": str(inputs / "train.jsonl"), "eval": str(inputs / "eval.jsonl")},
        "optim": {"rows_per_step": 4, "micro_batch": 4, "warmup_ratio": 0.0},
        "max_length": 128,
    }
    given = {"name": "sweep", "root": str(root), "train": train, "space": space, "steps": 4, "report_every": 2}
    return TuneSpec.model_validate({**given, "eval_rows": 4, "scheduler": None, **keys})


def rates(*values: float) -> dict[str, Any]:
    return {"optim.lr": {"kind": "choice", "values": values}, "adapter.rank": {"kind": "choice", "values": [2]}}


@pytest.fixture(scope="module")
def whole(ray_cluster: Session, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneSpec, TuneReport]:
    """A sweep of three that nothing disturbed: one runs to its end, one is stopped early, one diverges."""
    asha = {"grace_steps": 2, "reduction": 2}
    space = rates(1e-5, GOOD, 1e38)  # a grid begins in its middle
    spec = sweep(inputs, tmp_path_factory.mktemp("whole"), space, max_concurrent=1, scheduler=asha)
    return spec, tune(spec)


def test_the_lowest_held_out_loss_wins(whole: tuple[TuneSpec, TuneReport]) -> None:
    spec, report = whole
    assert [(trial.state, trial.steps) for trial in report.trials[:2]] == [("finished", 4), ("stopped", 2)]
    assert [[step for step, _ in trial.losses] for trial in report.trials[:2]] == [[2, 4], [2]]
    assert report.trials[0].losses[0][1] < report.trials[1].losses[0][1]
    assert report.best == {"optim.lr": GOOD, "adapter.rank": 2}
    assert isinstance(report.best_spec.adapter, LoraSpec)
    assert (report.best_spec.optim.lr, report.best_spec.adapter.rank) == tuple(report.best.values())
    assert report.best_spec.num_workers == spec.train.num_workers
    assert report.sampler.startswith("grid: all 3")
    assert report.peak_rss_bytes > 100 * 2**20
    whole_run, stopped = (trial.metrics for trial in report.trials[:2])
    assert whole_run["tokens"] > stopped["tokens"] > 0
    assert whole_run["adapter_bytes"] == stopped["adapter_bytes"] > 0
    assert whole_run["step_s"] * 4 < report.trials[0].wall_s


def test_a_diverging_trial_is_marked_and_the_sweep_goes_on(whole: tuple[TuneSpec, TuneReport]) -> None:
    failed = whole[1].trials[2]
    assert failed.state == "failed"
    assert failed.error is not None
    assert "the loss is" in failed.error
    assert all(math.isfinite(loss) for trial in whole[1].trials for _, loss in trial.losses)


def test_trials_that_ended_give_their_cpus_back(whole: tuple[TuneSpec, TuneReport]) -> None:
    until(
        lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"],
        "CPUs are free",
        within_s=FREED_WITHIN_S,
    )
    assert not [group for group in placement_group_table().values() if group["state"] == "CREATED"]


def test_a_finished_sweep_is_not_run_again(whole: tuple[TuneSpec, TuneReport]) -> None:
    spec, first = whole
    seen: list[TuneProgress] = []
    again = tune(spec, on_progress=seen.append)
    assert again.reused
    assert not first.reused
    assert not seen
    assert (again.trials, again.best, again.run_id) == (first.trials, first.best, first.run_id)


def test_a_run_folder_tells_what_was_done(whole: tuple[TuneSpec, TuneReport]) -> None:
    spec, report = whole
    folder = Path(spec.root) / "runs" / report.run_id
    assert {"spec.yaml", "provenance.json", "trials.json", "status.json"} <= {path.name for path in folder.iterdir()}
    resolved = spec.with_({"train.gpus_per_worker": 0})
    assert TuneSpec.model_validate(yaml.safe_load((folder / "spec.yaml").read_text())) == resolved
    assert json.loads((folder / "status.json").read_text())["best"] == report.best


@pytest.fixture(scope="module")
def continued(
    ray_cluster: Session, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TuneSpec, TuneReport, set[str]]:
    """A sweep of two, interrupted in the second and run again; and the trials that the rerun started.

    The soak compares a rerun's losses with those of a sweep that nothing disturbed.
    """
    spec = sweep(inputs, tmp_path_factory.mktemp("continued"), rates(0.001, GOOD), max_concurrent=1)

    def interrupt(progress: TuneProgress) -> None:
        if progress.done == 1 and progress.trials[-1].state == "running":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="1 of 2 trials are kept"):
        tune(spec, on_progress=interrupt)
    until(
        lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"],
        "CPUs are free",
        within_s=FREED_WITHIN_S,
    )
    started: set[str] = set()
    report = tune(spec, on_progress=lambda p: started.update(t.trial_id for t in p.trials if t.state == "running"))
    return spec, report, started


@pytest.mark.long
def test_ctrl_c_keeps_what_ended_and_a_rerun_continues(continued: tuple[TuneSpec, TuneReport, set[str]]) -> None:
    _, report, started = continued
    assert started == {trial.trial_id for trial in report.trials[1:]}
    assert [(trial.state, trial.steps) for trial in report.trials] == [("finished", 4)] * 2
    assert report.best == {"optim.lr": GOOD, "adapter.rank": 2}


@pytest.mark.long
def test_a_finished_sweep_is_given_finals_and_its_winner_is_published(
    continued: tuple[TuneSpec, TuneReport, set[str]],
) -> None:
    spec, before, _ = continued
    lock, seen = threading.Lock(), list[TuneProgress]()

    def watch(progress: TuneProgress) -> None:
        with lock:  # a progress bar has one: the callback can't be pickled
            seen.append(progress)

    winner = {"alias": "champion", "retention": False}
    asked = spec.with_({"finals": {"repeats": 2}, "winner": winner, "max_concurrent": 2, "train.num_workers": 1})
    report = tune(asked, on_progress=watch)
    assert report.trials[:2] == before.trials, "the search's own runs count"
    assert [(t.values["seed"], t.repeat_of, t.state) for t in report.trials[2:]] == [
        (1, trial.trial_id, "finished") for trial in reversed(before.trials)
    ]
    assert report.choice.verdict.startswith(f"lr={GOOD} ")
    assert report.best == before.best
    assert report.winner is not None
    store = Store(spec.root)
    assert aliases(store, "tiny") == {"champion": report.winner.train.version}
    assert open_adapter(store, "tiny", "champion").method["rank"] == 2
    assert (seen[-1].total, len(seen[-1].trials)) == (4, 4)
    again = tune(asked)
    assert again.reused
    assert again.winner is not None
    assert again.winner.train.reused
    assert (again.winner.before, again.winner.moved) == (None, True)


@pytest.mark.soak  # Ctrl-C, above, takes the same way back
def test_kill_9_of_the_driver_repeats_no_finished_trial(
    whole: tuple[TuneSpec, TuneReport], ray_cluster: Session, inputs: Path, tmp_path: Path
) -> None:
    """The rerun has two trials left, and runs them at the same time."""
    spec = sweep(inputs, tmp_path, rates(0.001, GOOD, 1e-5), max_concurrent=1)
    victim = subprocess.Popen(
        [sys.executable, "-m", "tests.ray.test_tune", spec.model_dump_json()], cwd=Path(__file__).parents[2]
    )
    records: list[dict[str, Any]] = []

    def second_runs() -> bool:
        assert victim.poll() is None, "the sweep ended before it was killed"
        found = list(tmp_path.glob("runs/*/trials.json"))
        records[:] = json.loads(found[0].read_text())["trials"] if found else []
        return len(records) > 1 and records[0]["state"] == "finished" and records[1]["state"] == "running"

    try:
        until(second_runs, "the second trial runs", within_s=FIRST_LOSS_WITHIN_S)
    finally:
        victim.kill()
        victim.wait()
    started: set[str] = set()
    together: set[int] = set()

    def note(progress: TuneProgress) -> None:
        running = {trial.trial_id for trial in progress.trials if trial.state == "running"}
        started.update(running)
        together.add(len(running))

    report = tune(spec.with_({"max_concurrent": 2}), on_progress=note)
    assert started == {trial.trial_id for trial in report.trials[1:]}
    assert max(together) == 2
    assert report.trials[0].wall_s == records[0]["wall_s"]
    assert losses(report, GOOD) == losses(whole[1], GOOD)


@pytest.mark.soak
def test_kill_9_while_the_winner_trains_repeats_no_trial_and_goes_on_from_its_checkpoint(
    ray_cluster: Session, inputs: Path, tmp_path: Path
) -> None:
    steps = {"train.optim.epochs": 40, "train.checkpoint_every": 5, "train.num_workers": 1}
    spec = sweep(inputs, tmp_path, rates(GOOD), winner={"alias": "champion", "retention": False}).with_(steps)
    victim = subprocess.Popen(
        [sys.executable, "-m", "tests.ray.test_tune", spec.model_dump_json(exclude_unset=True)],
        cwd=Path(__file__).parents[2],
    )

    def half_trained() -> bool:
        assert victim.poll() is None, "the sweep ended before it was killed"
        found = list(tmp_path.glob("runs/tiny-*/metrics.jsonl"))
        return bool(found) and len(found[0].read_text().splitlines()) >= 10

    try:
        until(half_trained, "the winner trains", within_s=2 * FIRST_LOSS_WITHIN_S)
    finally:
        victim.kill()
        victim.wait()
    seen: list[TuneProgress] = []
    report = tune(spec, on_progress=seen.append)
    assert report.reused
    assert not [progress for progress in seen if any(trial.state == "running" for trial in progress.trials)]
    assert report.winner is not None
    assert report.winner.train.steps == 120
    steps_told = [progress.winner.step for progress in seen if progress.winner]
    assert min(steps_told) > 5, "it went on from a checkpoint"
    assert aliases(Store(spec.root), "tiny") == {"champion": report.winner.train.version}


def test_one_driver_a_sweep(inputs: Path, tmp_path: Path) -> None:
    spec = sweep(inputs, tmp_path, rates(GOOD))
    with run_lock(Sweep.resolve(spec).paths), pytest.raises(RunError, match="another process is running it"):
        tune(spec)


def test_a_trial_that_no_node_can_hold_is_refused(ray_cluster: Session, inputs: Path, tmp_path: Path) -> None:
    spec = sweep(inputs, tmp_path, rates(GOOD)).with_({"train.cpus_per_worker": 4096})
    with pytest.raises(ClusterError, match="train.cpus_per_worker=4096: the largest node has"):
        tune(spec)


def losses(report: TuneReport, rate: float) -> tuple[tuple[int, float], ...]:
    (found,) = [trial.losses for trial in report.trials if trial.values["optim.lr"] == rate]
    return found


if __name__ == "__main__":  # the driver that is killed
    with session("local", num_cpus=2):
        tune(TuneSpec.model_validate_json(sys.argv[1]))
