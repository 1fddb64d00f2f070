"""Trials trained together in one process against the loop that trains one: the same numbers, whoever is beside."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftwork.errors import RunError
from graftwork.training.data import prepare
from graftwork.training.job import NonFiniteLoss, TrainJob
from graftwork.training.loop import run_steps
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


def test_a_trial_that_leaves_does_not_disturb_the_others(folder: Path, one_by_one: dict[str, list[StepReport]]) -> None:
    """One is stopped, one diverges in its third step, and both stood between those that stay."""
    diverging = {"adapter.rank": 4, "optim.lr": 1e38, "optim.schedule": "constant"}
    seen = Seen({"decayed": 2})
    jobs = {key: job_of(folder, **changes) for key, changes in {**TRIALS, "diverging": diverging}.items()}
    run_together(jobs, seen)
    same(seen.steps["decayed"], one_by_one["decayed"][:2])
    for key in ("first", "wide", "clipped"):
        same(seen.steps[key], one_by_one[key])
    assert [*seen.lost] == ["diverging"]
    assert "step 2 of 5: the held-out loss is nan" in str(seen.lost["diverging"])


def test_a_loss_that_is_no_number_is_noticed_at_its_step(folder: Path) -> None:
    diverging = {"adapter.rank": 4, "optim.lr": 1e38, "optim.schedule": "constant"}
    job = replace(job_of(folder, **diverging), eval_every=STEPS)
    with pytest.raises(NonFiniteLoss) as error:
        alone(job)
    seen = Seen()
    run_together({"diverging": job}, seen)
    assert str(seen.lost["diverging"]).startswith(str(error.value).partition(";")[0])
    assert [step.step for step in seen.steps["diverging"]] == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"quant.kind": "nf4", "quant.resident": "packed", "optim.gradient_checkpointing": True},
        {"objective": {"kind": "sft", "packing": "best_fit"}, "max_length": 96, "adapter.targets": "mlp"},
    ],
    ids=["packed nf4, checkpointing", "packed rows, some targets"],
)
def test_other_bases_rows_and_targets(folder: Path, changes: dict[str, Any]) -> None:
    trials = {key: {**TRIALS[key], **changes} for key in ("first", "wide")}
    seen = Seen()
    run_together({key: job_of(folder, **of) for key, of in trials.items()}, seen)
    for key, of in trials.items():
        same(seen.steps[key], alone(job_of(folder, **of)))


def test_trials_that_differ_in_what_each_has_of_its_own_can_share(folder: Path) -> None:
    specs = [job_of(folder, **changes).spec for changes in TRIALS.values()]
    assert all(can_share(specs[0], other) for other in specs)
    for key, value in {"adapter.targets": "mlp", "seed": 1, "optim.micro_batch": 1, "quant.kind": "nf4"}.items():
        assert not can_share(specs[0], job_of(folder, **{key: value}).spec), key


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({"adapter.dora": True}, {}, "adapter.dora"),
        ({"adapter.dropout": 0.1}, {}, "adapter.dropout=0.1"),
        ({"adapter": {"kind": "ia3"}}, {}, "adapter.kind=ia3"),
        ({"objective": {"kind": "sft", "answers": {}}}, {}, "objective.answers"),
        ({"num_workers": 2}, {}, "num_workers=2"),
        ({}, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({}, {"num_local_experts": 8}, "num_local_experts"),
    ],
    ids=str,
)
def test_what_goes_alone_says_why(folder: Path, changes: dict[str, Any], config: dict[str, Any], reason: str) -> None:
    spec = task(folder, **{"quant.kind": "none", "num_workers": 1, **changes})
    found = why_alone(spec, config)
    assert found is not None
    assert reason in found
    assert bool(config) or not can_share(spec, spec)
    assert why_alone(job_of(folder).spec, {"attention_dropout": 0.0, "hidden_size": 64}) is None
