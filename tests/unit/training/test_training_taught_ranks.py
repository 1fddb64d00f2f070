"""Preferences, labelled answers, reward models and distillation on two ranks, by each strategy, equal one process."""

from pathlib import Path
from typing import Any

import pytest

from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests.ranks import Task, train_on
from tests.tiny import write_tiny_base
from tests.training import labelled_task, pair_task, task

KINDS = ("dpo", "cpo", "orpo", "kto", "reward", "distill")
STRATEGIES = ("ddp", "zero2", "fsdp2")


def spec_of(folder: Path, kind: str, strategy: str) -> TrainSpec:
    """A few steps; 7 held-out rows, which two ranks can't share evenly."""
    usual: dict[str, Any] = {
        "quant.kind": "none",
        "optim.epochs": 1,
        "optim.micro_batch": 2,
        "data.eval_rows": 7,
        "strategy.kind": strategy,
        "name": kind,
    }
    if kind == "kto":
        return labelled_task(folder, **usual, objective={"kind": kind, "undesirable_weight": 2.0})
    if kind != "distill":
        return pair_task(folder, **usual, objective={"kind": kind})
    return task(folder, **usual, objective={"kind": kind, "teacher": str(folder / "other")})


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_two_ranks_learn_what_one_process_does(tmp_path: Path) -> None:
    """Losses of all steps and of held-out rows; the reference of DPO and the teacher are scored under each strategy."""
    write_tiny_base(tmp_path / "other", seed=1)
    jobs = {
        f"{kind} {strategy}": TrainJob(spec := spec_of(tmp_path, kind, strategy), prepare(spec))
        for kind in KINDS
        for strategy in STRATEGIES
    }
    together = train_on(2, {name: Task(job) for name, job in jobs.items()}, tmp_path / "ranks")
    for kind in KINDS:
        spec = spec_of(tmp_path, kind, "ddp").with_({"num_workers": 1})
        alone = run_steps(TrainJob(spec, prepare(spec)), lambda _: True)
        for strategy in STRATEGIES:
            found = together[f"{kind} {strategy}"].result
            assert dict(found.train_loss) == pytest.approx(dict(alone.train_loss), rel=1e-4), f"{kind} {strategy}"
            assert dict(found.eval_loss) == pytest.approx(dict(alone.eval_loss), rel=1e-4), f"{kind} {strategy}"
