"""Plain text on two workers: the packs, losses and held-out figures of one process, under every strategy."""

import json
from pathlib import Path

import pytest

from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.worker_messages import TrainJob
from tests.ranks import Task, train_on
from tests.unit.training.objectives.test_fim import CODE, fim_task
from tests.unit.training.objectives.test_training_text import TEXTS, text_task

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")


@pytest.mark.soak
def test_two_workers_learn_text_as_one_process_does(tmp_path: Path) -> None:
    for name, texts in (("text", TEXTS), ("held", TEXTS[:4]), ("code", CODE), ("held-code", CODE[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code = {"data.train": str(tmp_path / "code.jsonl"), "data.eval": str(tmp_path / "held-code.jsonl")}
    specs = {kind: text_task(tmp_path, **{"strategy.kind": kind, "num_workers": 2}) for kind in STRATEGIES}
    specs["fim"] = fim_task(tmp_path, **code, **{"num_workers": 2, "optim.epochs": 3})
    jobs = {name: TrainJob(spec, prepare(spec)) for name, spec in specs.items()}
    ended = train_on(2, {name: Task(job) for name, job in jobs.items()}, tmp_path / "ranks")
    alone = {name: run_steps(jobs[name], lambda _: True) for name in ("ddp", "fim")}
    for name, end in ended.items():
        one = alone["fim" if name == "fim" else "ddp"]
        assert end.losses == pytest.approx([loss for _, loss in one.train_loss], rel=1e-4), name
        assert [n for n in end.result.notes if "held-out" in n] == [n for n in one.notes if "held-out" in n], name
