"""Which rows a step sees, what a spec refuses, what decides a run's identity. No model runs here."""

from pathlib import Path

import numpy as np
import pytest

from graftwork.errors import ConfigError, DataError, RunError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.loop import step_plan
from graftwork.training.objectives.rows import TokenRows, prepare
from graftwork.training.report import progress_of
from graftwork.training.run import run_paths
from graftwork.training.run_lock import run_lock
from graftwork.training.spec import OptimSpec
from graftwork.training.worker_messages import StepLog, StepReport, read_steps
from tests.training import task, write_rows

LENGTHS = np.array([5, 9, 3, 7, 7, 2, 8, 4, 6, 10, 11, 1], dtype=np.int64)


def plan_rows(world: int, micro: int = 2, **optim: float) -> list[list[int]]:
    spec = OptimSpec.model_validate({"rows_per_step": 4, "micro_batch": micro, **optim})
    return [sorted(step) for step in step_plan(LENGTHS, spec, 7, world, None).rows_SR.tolist()]


def test_a_pass_sees_every_row_once_and_passes_differ() -> None:
    steps = plan_rows(world=2, epochs=2)
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_a_step_sees_the_same_rows_on_any_number_of_workers() -> None:
    assert plan_rows(world=1) == plan_rows(world=2) == plan_rows(world=4)


def test_the_last_step_is_filled_from_the_next_pass() -> None:
    assert [len(step) for step in plan_rows(world=1, epochs=1.25)] == [4, 4, 4, 4]


def test_max_steps_ends_a_run_or_goes_on_into_more_passes() -> None:
    optim = OptimSpec(rows_per_step=4, micro_batch=4)
    assert step_plan(LENGTHS, optim, 0, 1, max_steps=2).steps == 2
    assert step_plan(LENGTHS, optim, 0, 1, max_steps=9).steps == 9


def test_micro_batch_is_the_largest_divisor_that_fits() -> None:
    optim = OptimSpec(rows_per_step=12, micro_batch=4)
    plan = step_plan(LENGTHS, optim, 0, 2, None)
    assert (plan.micro_batch, plan.accumulation) == (3, 2)


def test_rows_of_a_forward_pass_are_of_similar_length() -> None:
    plan = step_plan(LENGTHS, OptimSpec(rows_per_step=12, micro_batch=3), 0, 2, None)
    passes = LENGTHS[plan.rows_SR[0]].reshape(-1, 3)
    padded = (passes.max(axis=1) * 3).sum()
    assert padded == 3 * (3 + 6 + 8 + 11), "sorted lengths cut in threes need the least padding"
    loads = passes.sum(axis=1).reshape(2, 2)  # (accumulation, worker)
    assert abs(int(loads[:, 0].sum() - loads[:, 1].sum())) <= 6, "dealt back and forth"


def test_tokens_of_a_step_leave_padding_out() -> None:
    plan = step_plan(LENGTHS, OptimSpec(rows_per_step=4), 0, 1, None)
    assert plan.tokens_S.tolist() == [int(LENGTHS[rows].sum()) for rows in plan.rows_SR]


def test_collate_pads_on_the_right_and_ignores_what_is_not_trained() -> None:
    rows = TokenRows.from_pairs([((5, 6, 7), (False, True, True)), ((8,), (True,))])
    batch = {key: value.tolist() for key, value in rows.collate([0, 1], pad_id=2).items()}
    assert batch["input_ids"] == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"] == [[-100, 6, 7], [8, -100, -100]]


def test_long_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    spec = task(tmp_path, max_length=26)
    data = prepare(spec)
    assert data.dropped > 0
    assert len(data.train) == 48 - data.dropped
    assert data.train.lengths_N.max() <= 26


def test_a_long_row_is_refused_by_number_where_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row \d+ \(id row\d+\): \d+ tokens") as caught:
        prepare(task(tmp_path, max_length=26, on_overlong="refuse"))
    assert "max_length=26" in caught.value.rule


def test_a_set_with_no_row_that_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 48 rows are longer than max_length=8"):
        prepare(task(tmp_path, max_length=8))


def test_workers_must_divide_the_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of num_workers=3"):
        task(tmp_path, num_workers=3)


def test_a_run_is_what_it_trains_on_not_where_it_lies_or_runs(tmp_path: Path) -> None:
    spec = task(tmp_path / "a")
    here = run_paths(spec)
    same = {"root": str(tmp_path / "other"), "alias": None, "num_workers": 1, "optim.micro_batch": 2}
    assert run_paths(spec.with_({**same, "checkpoint_every": 9})).digest == here.digest
    assert run_paths(task(tmp_path / "moved")).digest == here.digest, "the same files at another place"
    for change in ({"seed": 1}, {"optim.lr": 1e-3}, {"adapter.rank": 4}, {"quant.kind": "none"}, {"name": "other"}):
        assert run_paths(spec.with_(change)).digest != here.digest, change
    write_rows(tmp_path / "a" / "train.jsonl", 48, first=1)
    assert run_paths(spec).digest != here.digest, "the file's content changed"


def step(number: int, **changes: float) -> StepReport:
    fields = {
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": number * 10,
        "elapsed_s": number * 0.5,
        "step_s": 0.4,
    }
    return StepReport(step=number, total_steps=10, **{**fields, **changes})  # type: ignore[arg-type]


def test_the_step_log_goes_back_to_the_checkpoint_it_continues_from(tmp_path: Path) -> None:
    run = RunPaths(Store(str(tmp_path)), "t", "0" * 64)
    log = StepLog(run)
    for number in range(1, 6):
        log.add(step(number))
    with open(tmp_path / "runs" / run.run_id / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 1.')  # killed in the middle of a line
    assert [known.step for known in read_steps(run)] == [1, 2, 3, 4, 5]
    again = StepLog.resumed(run, step=3)
    again.add(step(4, loss=1.5))
    assert [(known.step, known.loss) for known in read_steps(run)] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.5)]


def test_progress_tells_pace_and_time_left() -> None:
    progress = progress_of([step(number, eval_loss=3.0) if number == 2 else step(number) for number in range(1, 5)])
    assert (progress.step, progress.total_steps, progress.eval_loss) == (4, 10, 3.0)
    assert progress.tokens_per_s == pytest.approx(40 / 1.6)
    assert progress.eta_s == pytest.approx(6 * 0.5)


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    run = RunPaths(Store(str(tmp_path)), "t", "0" * 64)
    with run_lock(run), pytest.raises(RunError, match="another process is running it"), run_lock(run):
        pass
    with run_lock(run):
        pass
