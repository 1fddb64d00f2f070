"""Distillation: the divergence against torch, a student that comes near its teacher, samples, teachers refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import kl_div
from transformers import TrainerCallback, set_seed

from graftwork import artifact, base_model
from graftwork.errors import ArtifactError, BaseModelError, ConfigError
from graftwork.storage import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.data import prepare
from graftwork.training.job import TrainJob
from graftwork.training.logits import trained_logits
from graftwork.training.loop import plan_of, run_steps
from graftwork.training.objectives import build
from graftwork.training.objectives.distill import TaughtTrainer, _prompt
from graftwork.training.objectives.setting import Setting
from graftwork.training.spec import TrainSpec
from graftwork.training.steplog import StepReport
from tests.adapters import facts
from tests.tiny import write_tiny_base
from tests.training import task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a teacher that was trained on the rows, published as `colours@latest`."""
    folder = tmp_path_factory.mktemp("distill")
    spec = task(folder, **{"optim.epochs": 3, "optim.micro_batch": 8, "quant.kind": "none"})
    run = RunPaths(Store(spec.root), spec.name, "2" * 64)
    result = run_steps(TrainJob(spec, prepare(spec), run), lambda _: True)
    method = {**spec.adapter.model_dump(mode="json"), "objective": "sft"}
    known: dict[str, Any] = {**facts(), "base_digest": base_model.resolve(spec.base).digest, "method": method}
    with Checkpoints(run).adapter(result.steps) as adapter:
        artifact.publish(
            run.store,
            spec.name,
            adapter,
            **{**known, "metrics": {"eval_loss": result.eval_loss[-1][1]}},
            alias="latest",
        )
    return folder


def student(folder: Path, **changes: Any) -> TrainSpec:
    objective = {"kind": "distill", "teacher": "colours@latest", **changes.pop("objective", {})}
    return task(folder, **{"name": "student", "quant.kind": "none", "objective": objective, **changes})


def trainer_of(spec: TrainSpec, folder: Path) -> TaughtTrainer:
    job, base = TrainJob(spec, prepare(spec)), base_model.resolve(spec.base)
    set_seed(0)
    model = attach(base_model.load(base, spec.quant, device="cpu", purpose="train").model, spec.adapter)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer: TaughtTrainer = build(
        Setting(job, plan_of(job, 1), base, model, folder / "out", TrainerCallback())
    ).trainer
    return trainer


def by_torch(student_NV: torch.Tensor, teacher_NV: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """Mean over positions by torch.nn.functional.kl_div, from whole logits."""
    ours, theirs = ((logits / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV))

    def divergence(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return kl_div(to, of, reduction="batchmean", log_target=True)

    if beta in (0, 1):
        return divergence(ours, theirs) if beta else divergence(theirs, ours)
    mixed = (beta * theirs.exp() + (1 - beta) * ours.exp()).log()
    return beta * divergence(theirs, mixed) + (1 - beta) * divergence(ours, mixed)


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.0)])
def test_loss_and_gradient_are_those_of_torchs_divergence(folder: Path, beta: float, temperature: float) -> None:
    trainer = trainer_of(student(folder, objective={"beta": beta, "temperature": temperature}), folder)
    inputs = trainer.data_collator([{"row": row} for row in range(6)])
    head = trainer.model.get_output_embeddings()
    student_NV, targets_N = trained_logits(trainer.model, head, inputs)
    with torch.no_grad():
        teacher_NV, _ = trained_logits(trainer.teacher, trainer.teacher.get_output_embeddings(), inputs)
    expected = by_torch(student_NV, teacher_NV, beta, temperature)
    ours = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(len(targets_N)))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    assert ours.item() > 0.01
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, a, b in zip(
        trained,
        torch.autograd.grad(ours, list(trained.values())),
        torch.autograd.grad(expected, list(trained.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


def learned(spec: TrainSpec) -> list[StepReport]:
    seen: list[StepReport] = []

    def see(step: StepReport) -> bool:
        seen.append(step)
        return True

    run_steps(TrainJob(spec, prepare(spec)), see)
    return seen


def test_the_student_comes_near_its_teacher(folder: Path) -> None:
    spec = student(folder, **{"optim.epochs": 3, "optim.lr": 1e-2, "optim.micro_batch": 8})
    seen, teacher = learned(spec), artifact.resolve(Store(spec.root), "colours@latest").metrics["eval_loss"]
    assert seen[-1].loss < 0.2 * seen[0].loss
    assert seen[-1].eval_loss is not None
    assert seen[-1].eval_loss < 0.3
    assert seen[-1].metrics["eval_nll"] == pytest.approx(teacher, abs=0.5)
    assert seen[0].metrics["on_policy"] == 0


def test_the_student_learns_on_its_own_samples(folder: Path) -> None:
    seen = learned(
        student(
            folder,
            objective={"on_policy": 0.5, "beta": 1.0, "max_new_tokens": 6},
            **{"optim.epochs": 2, "optim.gradient_checkpointing": True},
        )
    )
    shares = [step.metrics["on_policy"] for step in seen]
    assert set(shares) == {0.0, 1.0}
    losses = [step.eval_loss for step in seen if step.eval_loss is not None]
    assert losses[-1] < 0.7 * losses[0]


def test_samples_follow_the_prompts_and_end_at_a_stop_token(folder: Path) -> None:
    trainer = trainer_of(student(folder, objective={"on_policy": 1.0, "max_new_tokens": 5}), folder)
    inputs = trainer.data_collator([{"row": row} for row in range(4)])
    torch.manual_seed(0)
    sampled = trainer.sampled(inputs)
    for row in range(4):
        prompt = _prompt(inputs["input_ids"][row], inputs["labels"][row])
        ids, labels = sampled["input_ids"][row], sampled["labels"][row]
        assert ids[: len(prompt)].tolist() == prompt
        answer = labels[labels != -100].tolist()
        assert 1 <= len(answer) <= 5
        assert not trainer.stop_ids & {*answer[:-1]}
        assert int(sampled["attention_mask"][row].sum()) == len(prompt) + len(answer)


def test_a_teacher_that_cannot_teach_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other", seed=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|other|>"
    tokenizer["model"]["vocab"] = {
        re.sub(r"<\|endoftext\|>", "<|other|>", word): number for word, number in tokenizer["model"]["vocab"].items()
    }
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BaseModelError, match="teacher and student have one tokenizer"):
        prepare(student(folder, objective={"teacher": str(other)}))
    with pytest.raises(ArtifactError):
        prepare(student(folder, objective={"teacher": "nobody@latest"}))
    with pytest.raises((ConfigError, ValidationError), match="nothing can be learned"):
        student(folder, objective={"teacher": str(folder / "base")})


def test_another_base_teaches_and_decides_what_run_it_is(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other", seed=1)
    spec = student(folder, objective={"teacher": str(other)}, **{"optim.epochs": 1})
    seen = learned(spec)
    assert seen[-1].loss < seen[0].loss
    assert prepare(spec).digest() != prepare(student(folder)).digest()
    assert prepare(student(folder, objective={"teacher": {"base": str(other)}})).digest() == prepare(spec).digest()
