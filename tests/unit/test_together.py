"""Trials trained together in one process against the loop that trains one: the same numbers, whatever is beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graftwork.errors import RunError
from graftwork.training.data import prepare
from graftwork.training.job import NonFiniteLoss, TrainJob
from graftwork.training.loop import run_steps
from graftwork.training.spec import TrainSpec
from graftwork.training.steplog import StepReport
from graftwork.tuning.together.loop import run_together
from graftwork.tuning.together.rule import can_share, why_alone
from tests.training import task

STEPS = 5
TRIALS: dict[str, dict[str, Any]] = {
    "first": {"adapter.rank": 4, "optim.lr": 5e-3},
    "decayed": {"adapter.rank": 4, "adapter.alpha": 8, "optim.lr": 2e-3, "optim.weight_decay": 0.1},
    "wide": {"adapter.rank": 8, "adapter.rslora": True, "optim.schedule": "cosine", "optim.warmup_ratio": 0.3},
    "clipped": {"adapter.rank": 2, "optim.max_grad_norm": 0.1, "optim.schedule": "constant"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


def job_of(folder: Path, **changes: Any) -> TrainJob:
    plain = {"quant.kind": "none", "num_workers": 1, "optim.rows_per_step": 4, "optim.micro_batch": 2}
    spec = task(folder, **{**plain, **changes})
    return TrainJob(spec, prepare(spec), max_steps=STEPS, report_every=1, eval_every=1)


def alone(job: TrainJob, last: int = STEPS) -> list[StepReport]:
    found: list[StepReport] = []

    def report(step: StepReport) -> bool:
        found.append(step)
        return step.step < last

    run_steps(job, report)
    return found


class Seen:
    """What the loop of several reports; `last` is the step after which a trial is stopped."""

    def __init__(self, last: Mapping[str, int] | None = None) -> None:
        self.last = last or {}
        self.steps: dict[str, list[StepReport]] = {}
        self.lost: dict[str, RunError] = {}

    def __call__(self, steps: Mapping[str, StepReport], lost: Mapping[str, RunError]) -> dict[str, bool]:
        for key, step in steps.items():
            self.steps.setdefault(key, []).append(step)
        self.lost.update(lost)
        return {key: step.step < self.last.get(key, STEPS) for key, step in steps.items()}


def same(found: list[StepReport], expected: list[StepReport], rel: float = 1e-5) -> None:
    assert [step.step for step in found] == [step.step for step in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "eval_loss", "grad_norm", "lr"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=rel), (ours.step, name)
        assert (ours.tokens, ours.total_steps) == (theirs.tokens, theirs.total_steps)


@pytest.fixture(scope="module")
def one_by_one(folder: Path) -> dict[str, list[StepReport]]:
    return {key: alone(job_of(folder, **changes)) for key, changes in TRIALS.items()}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_trial_takes_the_steps_that_it_takes_alone(
    folder: Path, one_by_one: dict[str, list[StepReport]], count: int
) -> None:
    keys = list(TRIALS)[:count]
    seen = Seen()
    run_together({key: job_of(folder, **TRIALS[key]) for key in keys}, seen)
    for key in keys:
        same(seen.steps[key], one_by_one[key])
    assert not seen.lost
