"""Distillation: the divergence against torch, a student that comes near its teacher, samples, teachers refused."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import TrainerCallback, set_seed

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.errors import ArtifactError, BaseModelError, ConfigError, DataError
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import plan_of, run_steps
from graftwork.training.objectives.distill import _prompt, sampled
from graftwork.training.objectives.rows import PreparedData, TokenRows, prepare
from graftwork.training.objectives.trainer import TrainerContext, build, trained_logits
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport, TrainJob
from tests.adapters import facts
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base
from tests.training import COLOURS, task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a teacher that was trained on the rows, published as `colours@latest`."""
    folder = tmp_path_factory.mktemp("distill")
    _let_it_end(write_tiny_base(folder / "base"))
    lessons = [{"id": f"l{n}", "prompt": f"Name colour {n % 10}", "completion": COLOURS[n % 10]} for n in range(24)]
    for name, some in (("lessons", lessons), ("held", lessons[1:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(lesson) + "\n" for lesson in some))
    spec = lesson_of(folder, **{"optim.epochs": 16, "optim.lr": 1e-2})
    run = RunPaths(Store(spec.root), spec.name, "2" * 64)
    result = run_steps(TrainJob(spec, prepare(spec), run), lambda _: True)
    method = {**spec.adapter.model_dump(mode="json"), "objective": "sft"}
    known: dict[str, Any] = {
        **facts(),
        "base_digest": base_model.resolve(spec.base).digest,
        "method": method,
        "prompt": {},
    }
    with Checkpoints(run).model_files(result.steps) as adapter:
        artifact.publish(
            run.store,
            spec.name,
            adapter,
            **{**known, "metrics": {"eval_loss": result.eval_loss[-1][1]}},
            alias="latest",
        )
    return folder


def _let_it_end(base: Path) -> None:
    """Give the token that ends a turn an output row: as the padding token it has none (zeros), and is never likely."""
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][2] = weights["model.embed_tokens.weight"][3:9].mean(dim=0) * 2
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def lesson_of(folder: Path, **changes: Any) -> TrainSpec:
    files = {"data.train": str(folder / "lessons.jsonl"), "data.eval": str(folder / "held.jsonl")}
    return task(folder, **files, **{"quant.kind": "none", "optim.micro_batch": 8, **changes})


def student(folder: Path, **changes: Any) -> TrainSpec:
    objective = {"kind": "distill", "teacher": "colours@latest", **changes.pop("objective", {})}
    return lesson_of(folder, **{"name": "student", "objective": objective, **changes})


def trainer_of(spec: TrainSpec, folder: Path) -> Any:
    job, base = TrainJob(spec, prepare(spec)), base_model.resolve(spec.base)
    set_seed(0)
    model = attach(base_model.load(base, spec.quant, device="cpu", purpose="train").model, spec.adapter)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer: Any = build(TrainerContext(job, plan_of(job, 1), base, model, folder / "out", TrainerCallback())).trainer
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
    spec = student(folder, **{"optim.epochs": 10, "optim.lr": 1e-2})
    seen, teacher = learned(spec), resolve(Store(spec.root), "colours@latest").metrics["eval_loss"]
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
            **{"optim.epochs": 8, "optim.gradient_checkpointing": True},
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
    batch = sampled(trainer, inputs)
    for row in range(4):
        prompt = _prompt(inputs["input_ids"][row], inputs["labels"][row])
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert ids[: len(prompt)].tolist() == prompt
        answer = labels[labels != -100].tolist()
        assert 1 <= len(answer) <= 5
        assert not trainer.stop_ids & {*answer[:-1]}
        assert int(batch["attention_mask"][row].sum()) == len(prompt) + len(answer)


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


def offline(folder: Path, generate: dict[str, Any], **changes: Any) -> TrainSpec:
    """The questions of the rows, without answers; `gold` holds the right one."""
    path = folder / "questions.jsonl"
    if not path.exists():
        rows = [{"id": f"q{n}", "prompt": f"Name colour {n}", "gold": {"colour": COLOURS[n]}} for n in range(10)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"kind": "distill", "generate": {"max_new_tokens": 16, **generate}}
    files = {"data.train": str(path), "data.eval": str(folder / "lessons.jsonl")}
    return task(folder, **{"name": "reader", "quant.kind": "none", **files, "objective": objective, **changes})


def texts(data: PreparedData, spec: TrainSpec) -> list[str]:
    """What is learned of each row, as text."""
    template, rows = base_model.template(base_model.resolve(spec.base)), data.train
    assert isinstance(rows, TokenRows)
    return [template.decode(ids[trained].tolist()) for ids, trained in (rows.row(i) for i in range(len(rows)))]


def test_a_teacher_writes_once_what_is_then_learned(folder: Path) -> None:
    spec = offline(folder, {"keep": {"name": "regex", "pattern": "[a-z ]+"}}, **{"objective.teacher": "colours@latest"})
    data = prepare(spec)
    colours = [colour for colour in texts(data, spec) if colour in COLOURS]
    kept = len(data.train)
    assert 7 <= len(colours) <= kept <= 10
    assert re.fullmatch(rf"{kept} of 10 answers of the teacher kept \(keep=regex, .*", data.notes[0])
    assert all(re.fullmatch("[a-z ]+", text) for text in texts(data, spec))
    (folder_of_texts,) = (folder / "root" / "teaching").iterdir()
    before = (folder_of_texts / "answers.jsonl").stat().st_mtime_ns
    assert prepare(spec).digest() == data.digest()
    assert (folder_of_texts / "answers.jsonl").stat().st_mtime_ns == before
    result = run_steps(TrainJob(spec, data), lambda _: True)
    assert result.train_loss[-1][1] < result.train_loss[0][1]


def test_an_endpoint_of_our_own_teaches(folder: Path) -> None:
    """What it writes over HTTP is what the same adapter writes here, since both take the likeliest token."""
    root = folder / "root"
    serving = ServeSpec.model_validate(
        {
            "base": str(folder / "base"),
            "root": str(root),
            "quant": {"kind": "none", "dtype": "float32"},
            "engine": {"max_seq_len": 256, "num_threads": 1},
        }
    )
    here = offline(folder, {}, **{"objective.teacher": "colours@latest"})
    with local_endpoint(serving) as url:
        model = httpx.get(f"{url}/v1/models").json()["data"]
        (name,) = [one["id"] for one in model if "colours@latest" in one["id"]]
        spec = offline(folder, {"url": f"{url}/v1", "model": name})
        assert texts(prepare(spec), spec) == texts(prepare(here), here)
        with pytest.raises(DataError, match=r"HTTP 404"):
            prepare(offline(folder, {"url": f"{url}/v1", "model": "nobody"}))
    assert len(prepare(spec).train) > 0, "the answers are kept: the endpoint is gone"
    with pytest.raises(DataError, match="nothing answers"):
        prepare(offline(folder, {"url": f"{url}/v1", "model": name}, seed=1))
    with pytest.raises(DataError, match="none of the answers to 10 questions is kept"):
        prepare(offline(folder, {"keep": "json"}, **{"objective.teacher": "colours@latest"}))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({}, "name one teacher"),
        ({"teacher": "a@b", "generate": {"url": "http://x/v1", "model": "m"}}, "name one teacher"),
        ({"teacher": "a@b", "generate": {}, "beta": 0.5}, "beta can't take effect with generate"),
        ({"teacher": "a@b", "generate": {"samples": 3}}, "raise temperature"),
        ({"teacher": "a@b", "generate": {"keep": {"name": "reward_model", "model": "a@b"}}}, "no reward model"),
        ({"generate": {"url": "http://x/v1"}}, "url and model go together"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(folder: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        task(folder, objective={"kind": "distill", **objective})
