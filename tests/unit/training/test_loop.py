"""The loop on a tiny model in this process: its numbers against plain PyTorch and TRL, its ends, its checkpoints."""

import ctypes
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed

from graftwork.adapters.lora import LoraSpec
from graftwork.base import load as base_model
from graftwork.errors import ConfigError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.loop import run_steps, step_plan
from graftwork.training.objectives import sft
from graftwork.training.objectives.rows import prepare
from graftwork.training.objectives.trainer import TrainerContext, build
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, NonFiniteLoss, StepReport, TrainJob, read_steps
from tests.tiny import VOCAB_SIZE
from tests.training import task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def go_on(_: StepReport) -> bool:
    return True


def trainer_of(spec: TrainSpec, folder: Path) -> Any:
    data = prepare(spec)
    plan = step_plan(data.train.lengths_N, spec.optim, spec.seed, 1, None)
    base = base_model.resolve(spec.base)
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    set_seed(spec.seed)
    model = attach(loaded.model, spec.adapter)
    setting = TrainerContext(TrainJob(spec, data), plan, base, model, folder / "out", TrainerCallback())
    return build(setting).trainer, data


def gradients(trainer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    torch.autograd.backward(loss)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_scoring_trained_positions_alone_equals_trl(folder: Path, kind: str) -> None:
    trainer, data = trainer_of(task(folder, **{"quant.kind": kind}), folder)
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave no gradient on A
            torch.nn.init.normal_(parameter, std=0.02)
    inputs = data.train.collate([0, 1, 2, 3], data.pad_id)
    trained = (inputs["labels"][:, 1:] != -100).sum()
    ours = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=trained)
    plain = super(type(trainer), trainer).compute_loss(trainer.model, dict(inputs), num_items_in_batch=trained)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    ours_by_name, plain_by_name = gradients(trainer, ours), gradients(trainer, plain)
    assert len(ours_by_name) == 2 * 7 * 2, "A and B on seven linear layers of two blocks"
    for name, gradient in ours_by_name.items():
        torch.testing.assert_close(gradient, plain_by_name[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_takes_no_gradient_away(folder: Path, kind: str) -> None:
    """bitsandbytes repacks nf4 at the first forward in eval mode on some CPUs, and has no backward for that form."""

    def gradients_of(*, evaluate: bool) -> dict[str, torch.Tensor]:
        trainer, data = trainer_of(task(folder, **{"quant.kind": kind}), folder)
        inputs = data.train.collate([0, 1, 2, 3], data.pad_id)
        if evaluate:
            trainer.model.eval()
            with torch.no_grad():
                trainer.model(**inputs)
        trainer.model.train()
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        return gradients(trainer, trainer.compute_loss(trainer.model, dict(inputs)))

    fresh, after = gradients_of(evaluate=False), gradients_of(evaluate=True)
    assert len(fresh) == 2 * 7 * 2
    for name, gradient in fresh.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_curve_is_that_of_a_plain_pytorch_loop(folder: Path) -> None:
    """Pinned to PEFT and torch.optim.AdamW: same rows in order, loss over trained tokens, clipping, schedule."""
    spec = task(folder, **{"quant.kind": "none", "optim.micro_batch": 2})
    job = TrainJob(spec, prepare(spec))
    result = run_steps(job, go_on)
    assert result.train_loss[-1][1] < 0.7 * result.train_loss[0][1]
    assert [loss for _, loss in result.train_loss] == pytest.approx(plain_losses(job), rel=2e-4)


def plain_losses(job: TrainJob) -> list[float]:
    from peft import get_peft_model
    from transformers import get_linear_schedule_with_warmup

    spec, rows = job.spec, job.data.train
    torch.manual_seed(spec.seed)
    base = AutoModelForCausalLM.from_pretrained(base_model.resolve(spec.base).folder, dtype=torch.float32)
    assert isinstance(spec.adapter, LoraSpec)
    model = get_peft_model(base, spec.adapter.peft_config(base))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plan = step_plan(rows.lengths_N, spec.optim, spec.seed, 1, None)
    optimizer = torch.optim.AdamW(parameters, lr=spec.optim.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(spec.optim.warmup_ratio * plan.steps), plan.steps)
    losses = []
    for step in plan.rows_SR:
        batch = rows.collate(step.tolist(), job.data.pad_id)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.optim.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_held_out_loss_weighs_tokens_not_batches(folder: Path) -> None:
    spec = task(folder, **{"quant.kind": "none", "optim.micro_batch": 3})
    trainer, data = trainer_of(spec, folder)
    assert data.eval is not None
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(data.eval)):
            batch = data.eval.collate([index], data.pad_id)
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += trainer.model(**batch).loss.item() * count
            tokens += count
    assert sft.held_out_loss(trainer, data.eval, data.pad_id, 3) == pytest.approx(total / tokens, rel=1e-5)


def test_reports_come_at_their_steps_and_can_stop_the_loop(folder: Path) -> None:
    spec = task(folder)
    seen: list[StepReport] = []

    def until_nine(report: StepReport) -> bool:
        seen.append(report)
        return report.step < 9

    result = run_steps(TrainJob(spec, prepare(spec), report_every=3, eval_every=4, max_steps=20), until_nine)
    assert [report.step for report in seen] == [3, 4, 6, 8, 9]
    assert [report.step for report in seen if report.eval_loss is not None] == [4, 8]
    assert result.stopped
    assert result.steps == 9
    assert len(result.train_loss) == 9
    assert seen[-1].total_steps == 20
    assert result.peak_rss_bytes_per_worker[0] > 50e6


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(folder: Path) -> None:
    spec = task(
        folder, **{"optim.lr": 1e30, "optim.schedule": "constant", "optim.warmup_ratio": 0.6, "checkpoint_every": 1}
    )
    run = RunPaths(Store(str(folder / "diverged")), "colours", "0" * 64)
    with pytest.raises(NonFiniteLoss) as caught:
        run_steps(TrainJob(spec, prepare(spec), run), go_on)
    steps = read_steps(run)
    assert f"step {len(steps) + 1} of 12" in caught.value.subject
    assert f"checkpoint of step {steps[-1].step} is the last good one" in caught.value.problem
    assert "optim.lr" in caught.value.hint
    assert all(math.isfinite(known.loss) for known in steps)


class Killed(Exception):
    """Stands for the death of the process: nothing in the loop catches it."""


def killed_at(step: int) -> Callable[[StepReport], bool]:
    def report(done: StepReport) -> bool:
        if done.step == step:
            raise Killed
        return True

    return report


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> LoopResult:
    spec = task(folder, **{"adapter.dropout": 0.1})
    return run_steps(TrainJob(spec, prepare(spec)), go_on)


@pytest.mark.parametrize("moment", [3, 4, 5, 11, 12])
def test_killed_at_any_step_the_same_curve_comes_out(folder: Path, uninterrupted: LoopResult, moment: int) -> None:
    """Before, at and after a checkpoint (every 4 steps), and at the last step. Dropout makes the random state count."""
    spec = task(folder, **{"adapter.dropout": 0.1})
    job = TrainJob(spec, prepare(spec), RunPaths(Store(str(folder / f"killed{moment}")), "colours", "0" * 64))
    with pytest.raises(Killed):
        run_steps(job, killed_at(moment))
    seen: list[StepReport] = []

    def note(report: StepReport) -> bool:
        seen.append(report)
        return True

    result = run_steps(job, note)
    assert seen[0].step == (moment - 1) // 4 * 4 + 1, "the checkpoint of the step itself was not yet written"
    assert result.train_loss == uninterrupted.train_loss
    assert result.eval_loss == uninterrupted.eval_loss
    assert job.run is not None
    assert [known.step for known in read_steps(job.run)] == list(range(1, 13))


def test_two_checkpoints_are_kept_without_pickles_or_copies_of_the_base(folder: Path) -> None:
    spec = task(folder)
    run = RunPaths(Store(str(folder / "kept")), "colours", "0" * 64)
    result = run_steps(TrainJob(spec, prepare(spec), run), go_on)
    again = run_steps(TrainJob(spec, prepare(spec), run), go_on)
    assert (again.steps, again.train_loss, again.eval_loss) == (result.steps, result.train_loss, result.eval_loss)
    assert run.store.list(*run.checkpoints()) == ["checkpoint-12", "checkpoint-8"]
    assert set(run.store.list(*run.checkpoints("checkpoint-12"))) == {
        "COMMITTED.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }


@pytest.fixture
def gpt2(folder: Path) -> TrainSpec:
    """Another architecture: learned positions, fused attention weights, Conv1D instead of Linear, a bias everywhere."""
    spec = task(folder)
    base = folder / "gpt2"
    if not base.exists():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=128))
        model.save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (base / name).write_bytes((folder / "base" / name).read_bytes())
    return spec.with_({"base": str(base), "quant.kind": "none"})


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
def test_another_architecture_trains(gpt2: TrainSpec, targets: str) -> None:
    spec = gpt2.with_({"adapter.targets": targets})
    result = run_steps(TrainJob(spec, prepare(spec), max_steps=4), go_on)
    assert result.train_loss[-1][1] < result.train_loss[0][1]


def test_targets_name_blocks_of_the_model(gpt2: TrainSpec) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2.base.uri)
    found = LoraSpec(targets="attention").peft_config(model).target_modules
    assert found == {f"transformer.h.{block}.attn.{layer}" for block in (0, 1) for layer in ("c_attn", "c_proj")}
    with pytest.raises(ConfigError, match=r"adapter\.targets=mlp"):
        LoraSpec(targets="mlp").peft_config(HeadOnly())


class HeadOnly(torch.nn.Module):
    """A model without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 4)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def get_decoder(self) -> torch.nn.Module:
        return self


def test_a_schedule_in_one_go_is_its_chain_of_segments(folder: Path, tmp_path: Path) -> None:
    """The second segment begins from the checkpoint of the first, as a member of a population does."""
    spec = task(folder, **{"optim.lr": 2e-2, "optim.micro_batch": 8, "checkpoint_every": 100, "quant.kind": "none"})
    found, data = spec.with_({"optim.factors": [[0.5, 2.0]]}), prepare(spec)
    first, second = (RunPaths(Store(str(tmp_path)), "s", "0" * 64).part("trials", name) for name in "ab")
    rates: list[float] = []

    def note(step: StepReport) -> bool:
        rates.append(step.lr)
        return True

    begun = run_steps(TrainJob(spec, data, first, max_steps=4, eval_every=2), lambda step: step.step < 2)
    ended = run_steps(TrainJob(found, data, second, first, max_steps=4, eval_every=2), go_on)
    whole = run_steps(TrainJob(found, data, max_steps=4, eval_every=2), note)
    assert dict(begun.eval_loss) | dict(ended.eval_loss) == dict(whole.eval_loss)
    assert rates == pytest.approx([0.0, 2e-2, 2 * 2e-2 * 2 / 3, 2 * 2e-2 / 3]), "one warm-up step, and twice the rest"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc keeps freed memory; others do not")
def test_a_step_gives_freed_memory_back(folder: Path) -> None:
    """Rows of changing lengths leave holes that glibc keeps: here 200 MiB of them, each below a block in use."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pins: list[torch.Tensor] = []
    seen: list[int] = []

    def leave_holes(step: StepReport) -> bool:
        if step.step == 1:
            seen.append(resident())
            del_me = torch.ones(31 * 2**18)  # freed, it lifts the size from which glibc maps blocks of their own
            del del_me
            blocks = []
            for _ in range(200):
                blocks.append(torch.ones(2**18))
                pins.append(torch.ones(3 * 2**13))
            assert resident() - seen[0] > 150 * 2**20
            del blocks
        seen.append(resident())
        return True

    run_steps(TrainJob(spec := task(folder), prepare(spec), max_steps=2), leave_holes)
    assert seen[1] - seen[0] > 150 * 2**20, "freed, and still resident"
    assert seen[2] - seen[0] < 60 * 2**20
    assert len(pins) == 200
