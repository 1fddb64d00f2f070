"""Checkpoints on a disk: what is kept, what is refused before it counts, what is left out when a run goes on."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.errors import ConfigError, StorageError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import (
    MARKER,
    AsyncCheckpointSaver,
    CheckpointLost,
    CheckpointMark,
    Checkpoints,
    Shapes,
    checksum_of,
    differences,
    faults_of_weights,
    surplus,
)
from graftwork.training.checkpoint_resume import ResumePoint, read_starts
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.ray_resources import room_for
from graftwork.training.run import ResolvedRun, _write_run_inputs, _write_status, check
from graftwork.training.spec import CheckpointSpec, TrainSpec, world_sizes
from graftwork.training.worker_messages import LoopResult, StepLog, StepReport, TrainJob
from tests.training import task, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def spec(folder: Path) -> TrainSpec:
    return task(folder, **{"eval_every": 2, "checkpoint_every": 2, "checkpoints.keep_last": 3, "adapter.dropout": 0.1})


@pytest.fixture(scope="module")
def done(folder: Path, spec: TrainSpec) -> tuple[TrainJob, LoopResult]:
    """A finished run of 12 steps with three checkpoints."""
    job = TrainJob(spec, prepare(spec), RunPaths(Store(str(folder / "done")), "colours", "0" * 64))
    return job, run_steps(job, lambda _: True)


def copied(done: tuple[TrainJob, LoopResult], folder: Path) -> TrainJob:
    """The same run elsewhere, as if it had been killed before it said that it is finished."""
    job, _ = done
    assert job.run is not None
    run = RunPaths(Store(str(folder)), "colours", "0" * 64)
    job.run.store.download(run.store.local_dir(*run.file()), *job.run.file())
    return TrainJob(job.spec, job.data, run)


def file_of(job: TrainJob, step: int, name: str) -> Path:
    assert job.run is not None
    return Checkpoints(job.run).folder(step) / name


def test_the_marker_tells_each_files_sum_and_the_steps_figures(done: tuple[TrainJob, LoopResult]) -> None:
    job, result = done
    assert job.run is not None
    mark = Checkpoints(job.run).newest()
    assert mark is not None
    there = {path.name for path in Checkpoints(job.run).folder(12).iterdir()} - {MARKER}
    assert set(mark.files) == there
    assert mark.files["optimizer.pt"] == checksum_of(file_of(job, 12, "optimizer.pt"))
    assert mark.metrics == {"loss": result.train_loss[-1][1], "eval_loss": result.eval_loss[-1][1]}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "has another sha256": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "bytes of": lambda path: os.truncate(path, path.stat().st_size // 2),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_and_said(
    done: tuple[TrainJob, LoopResult], tmp_path: Path, damage: str
) -> None:
    """Whatever happened to a file, the checkpoint before is gone on from, and the same curve comes out."""
    job = copied(done, tmp_path)
    DAMAGES[damage](file_of(job, 12, "optimizer.pt"))
    first: list[StepReport] = []

    def note(report: StepReport) -> bool:
        first.append(report)
        return True

    result = run_steps(job, note)
    assert first[0].step == 11
    assert result.train_loss == done[1].train_loss
    assert any("step 12 is damaged (optimizer.pt" in note and damage in note for note in result.notes), result.notes
    assert job.run is not None
    assert [begun["step"] for begun in read_starts(job.run)] == [0, 10]


def test_a_damaged_adapter_is_not_published(done: tuple[TrainJob, LoopResult], tmp_path: Path) -> None:
    job = copied(done, tmp_path)
    DAMAGES["has another sha256"](file_of(job, 12, "adapter_model.safetensors"))
    assert job.run is not None
    with pytest.raises(StorageError, match="another sha256"), Checkpoints(job.run).model_files(12):
        pass


def test_a_checkpoint_that_a_strategy_cannot_load_is_refused(spec: TrainSpec) -> None:
    start = ResumePoint(CheckpointMark(12, 1.0, 2, strategy="zero2"))
    with pytest.raises(ConfigError, match="written by strategy zero2") as caught:
        start.require_loadable(spec)
    assert caught.value.hint == "--set strategy.kind=zero2"
    zero2 = spec.with_({"strategy.kind": "zero2"})
    start.require_loadable(zero2)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("nan", "lora_A.weight is not finite"),
        ("zero", "every number is 0"),
        ("fewer", "1 of 28 trained tensors are missing, e.g. 1 of shape"),
    ],
)
def test_weights_that_no_training_makes_are_no_checkpoint(
    done: tuple[TrainJob, LoopResult], tmp_path: Path, fault: str, said: str
) -> None:
    job = copied(done, tmp_path)
    assert job.run is not None
    checkpoints = Checkpoints(job.run)
    weights = file_of(job, 12, "adapter_model.safetensors")
    tensors = load_file(weights)
    trained: Shapes = Counter(tuple(tensor.shape) for tensor in tensors.values())
    assert faults_of_weights(weights.parent, trained) == []
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    if fault == "fewer":
        del tensors[name]
    elif fault == "nan":
        tensors[name][0, 0] = torch.nan
    else:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(tensors, weights)
    checkpoints.folder(12).rename(checkpoints.folder(14))
    file_of(job, 14, MARKER).unlink()
    saver = AsyncCheckpointSaver(checkpoints, job.spec.checkpoints, trained, StepLog(None), sends=True)
    saver.save(CheckpointMark(14, 1.0, 1))
    with pytest.raises(CheckpointLost, match=said) as caught:
        saver.wait()
    with pytest.raises(CheckpointLost, match=said):
        saver.save(CheckpointMark(16, 1.0, 1))
    saver.close()
    assert "the checkpoint of step 10 is the last complete one" in caught.value.problem
    assert [mark.step for mark in checkpoints.marks()] == [8, 10]


def test_the_newest_and_the_best_are_kept() -> None:
    losses = {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.6, 10: 0.7}
    marks = [CheckpointMark(step, 0.0, 1, metrics={"eval_loss": loss}) for step, loss in losses.items()]
    assert surplus(marks, CheckpointSpec(keep_last=2)) == [2, 4, 6]
    assert surplus(marks, CheckpointSpec(keep_last=1, keep_best=2)) == [2, 8]
    assert surplus(marks, CheckpointSpec(keep_last=1, keep_best=1, higher_is_better=True)) == [2, 4, 6, 8]
    unmeasured = [*marks, CheckpointMark(12, 0.0, 1)]
    assert surplus(unmeasured, CheckpointSpec(keep_last=1, keep_best=1)) == [2, 6, 8, 10]


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_checkpoint_whose_metric_is_nan_is_none_of_the_best(higher_is_better: bool) -> None:
    figures = {2: math.nan, 4: 0.3, 6: math.nan, 8: math.inf if higher_is_better else -math.inf, 10: 0.7}
    marks = [CheckpointMark(step, 0.0, 1, metrics={"eval_loss": figure}) for step, figure in figures.items()]
    keep = CheckpointSpec(keep_last=1, keep_best=2, higher_is_better=higher_is_better)
    assert surplus(marks, keep) == [2, 6, 8]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_marker_is_json_whatever_was_measured(tmp_path: Path) -> None:
    run = RunPaths(Store(str(tmp_path)), "colours", "0" * 64)
    checkpoints = Checkpoints(run)
    checkpoints.commit(CheckpointMark(4, 1.0, 1, metrics={"loss": 0.5, "eval_loss": math.nan, "eval_reward": math.inf}))
    json.loads((checkpoints.folder(4) / MARKER).read_text(), parse_constant=refuse_constant)
    assert [mark.metrics for mark in checkpoints.marks()] == [{"loss": 0.5}]


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    run = RunPaths(Store(str(tmp_path)), "colours", "0" * 64)
    Checkpoints(run).folder(4).mkdir(parents=True)
    with pytest.raises(StorageError, match=f"checkpoint-4: it has no {MARKER}"), Checkpoints(run).model_files(4):
        pass


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    run = RunPaths(Store(str(tmp_path)), "colours", "0" * 64)
    checkpoints = Checkpoints(run)
    for step in (2, 4):
        checkpoints.commit(CheckpointMark(step, 1.0, 1))
    (checkpoints.work_dir() / "4").mkdir()
    assert [mark.step for mark in checkpoints.marks()] == [2, 4]
    assert [mark.step for mark in checkpoints.marks(last=1)] == [4]
    assert [mark.step for mark in checkpoints.marks(last=3)] == [2, 4]
    assert checkpoints.marks(last=0) == []


def test_a_run_keeps_its_best_checkpoint(folder: Path, spec: TrainSpec) -> None:
    """With a rate that grows too large in the middle the held-out loss has its lowest point before the end."""
    rough = spec.with_({"optim.lr": 0.2, "checkpoints": {"keep_last": 1, "keep_best": 1}, "optim.warmup_ratio": 0.9})
    run = RunPaths(Store(str(folder / "best")), "colours", "0" * 64)
    result = run_steps(TrainJob(rough, prepare(rough), run), lambda _: True)
    best = min(result.eval_loss, key=lambda found: found[1])[0]
    assert best != 12, "the last is not the best here"
    assert [mark.step for mark in Checkpoints(run).marks()] == [best, 12]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoints.metric": "loss"}, "takes effect with checkpoints.keep_best alone"),
        ({"checkpoints.keep_best": 1, "checkpoint_every": 3}, "must be a multiple of eval_every=2"),
        ({"recovery.min_workers": 3}, "min_workers=3 is more than num_workers=2"),
    ],
)
def test_what_cannot_take_effect_is_refused(spec: TrainSpec, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spec.with_(changes)


def test_a_run_goes_on_with_numbers_of_workers_that_share_a_step_evenly(spec: TrainSpec) -> None:
    assert world_sizes(spec.with_({"num_workers": 4, "recovery.min_workers": 1})) == [4, 2, 1], "of 8 rows a step"
    assert world_sizes(spec.with_({"num_workers": 4})) == [4]


def test_differences_are_named(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"abc")
    kept = {"kept": checksum_of(tmp_path / "kept"), "sub/lost": checksum_of(tmp_path / "kept")}
    assert differences(tmp_path, kept) == ["sub/lost is missing"]


def test_a_changed_spec_is_told_apart_from_the_unfinished_run(spec: TrainSpec, folder: Path) -> None:
    """The notes that `graftwork train` prints before it starts."""
    held_out = write_rows(folder / "longer.jsonl", 8, answer_repeats=5)  # other answers than the training rows have
    begun = spec.with_({"root": str(folder / "relatives"), "data.eval": str(held_out)})
    assert check(begun) == []
    run = ResolvedRun.resolve(begun)
    _write_run_inputs(run)
    _write_status(run.paths, "interrupted")
    assert check(begun) == [], "the same spec goes on"
    assert check(begun.with_({"num_workers": 1, "checkpoint_every": 4})) == [], "no part of a run's identity"
    (note,) = check(begun.with_({"optim.lr": 0.1, "seed": 5}))
    assert f"{run.paths.run_id} is unfinished at its start" in note
    assert "differs in optim.lr (0.005 there, 0.1 here), seed (0 there, 5 here)." in note
    _write_status(run.paths, "finished")
    assert check(begun.with_({"seed": 5})) == [], "a finished run asks for nothing"


def test_a_worker_lies_on_one_node(spec: TrainSpec) -> None:
    """Two nodes of three CPUs have room for two workers of two CPUs, though they have six together."""
    wide = spec.with_({"cpus_per_worker": 2.0})
    assert room_for(wide, [{"CPU": 3.0}, {"CPU": 3.0}, {"memory": 1e9}]) == 2
    assert room_for(wide.with_({"gpus_per_worker": 1.0}), [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}]) == 2


def test_values_of_a_frozen_part_make_no_trained_tensor_up(tmp_path: Path) -> None:
    """Fused experts are saved as one tensor an expert; a tower that is not trained is saved with the decoder."""
    trained: Shapes = Counter({(8, 8): 4, (3, 6, 5): 1})
    saved = {f"expert{n}": torch.ones(6, 5) for n in range(3)} | {f"layer{n}": torch.ones(8, 8) for n in range(4)}
    save_file(saved | {"tower": torch.ones(100, 100)}, tmp_path / "model.safetensors")
    assert faults_of_weights(tmp_path, trained) == []
    del saved["layer3"]
    save_file(saved | {"tower": torch.ones(100, 100)}, tmp_path / "model.safetensors")
    assert "e.g. 1 of shape (8, 8)" in faults_of_weights(tmp_path, trained)[0]
