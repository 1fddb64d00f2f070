"""The load-balancing loss of a mixture-of-experts base: that of TRL's SFTTrainer, in sft and in distillation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

from graftwork.base import load as base_model
from graftwork.compat.hf import step_figures
from graftwork.training.adapters.attach import attach
from graftwork.training.loop import plan_of, run_steps, step_plan
from graftwork.training.lr_schedule import scheduler_of
from graftwork.training.objectives.rows import PreparedData, prepare
from graftwork.training.objectives.trainer import TrainerContext, build
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests.families import write_family
from tests.tiny import write_tiny_base
from tests.training import task, write_rows

MICRO_BATCH, PASSES = 2, 4


def trl_figures(spec: TrainSpec, data: PreparedData, folder: Path) -> tuple[list[float], list[float]]:
    """(loss, load-balancing loss) of each step of SFTTrainer as it comes, on the same rows in the same order."""
    from datasets import Dataset
    from transformers import AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(spec.seed)
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    model = attach(loaded.model, spec.adapter)
    plan = step_plan(data.train.lengths_N, spec.optim, spec.seed, 1, None)
    planned = scheduler_of(spec.optim, plan.steps)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": PASSES,
        "max_steps": plan.steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": spec.optim.lr,
        "lr_scheduler_type": planned.name,
        "warmup_steps": planned.warmup_steps,
        "max_grad_norm": spec.optim.max_grad_norm,
        "weight_decay": spec.optim.weight_decay,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    still = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": [], "save_strategy": "no"}
    quiet = {"logging_steps": 1, "disable_tqdm": True, "max_length": None, "remove_unused_columns": False}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder / "trl"), **settings, **still, **quiet),
        train_dataset=Dataset.from_dict({"row": plan.rows_SR.reshape(-1)}),
        data_collator=lambda items: data.train.collate([item["row"] for item in items], data.pad_id),
        processing_class=AutoTokenizer.from_pretrained(spec.base.uri),
    )
    trainer.train()
    steps = [log for log in trainer.state.log_history if "aux_loss" in log]
    return [log["loss"] for log in steps], [log["aux_loss"] for log in steps]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_loss_is_that_of_trl(kind: str, tmp_path: Path) -> None:
    write_family(tmp_path / "base", kind)
    write_rows(tmp_path / "train.jsonl", 16)
    write_rows(tmp_path / "eval.jsonl", 4, first=1000)
    keys = {"optim.rows_per_step": MICRO_BATCH * PASSES, "optim.micro_batch": MICRO_BATCH, "optim.epochs": 2}
    spec = task(tmp_path, **{"quant.kind": "none", "adapter": {"rank": 4}, **keys})
    data, ours = prepare(spec), []
    run_steps(TrainJob(spec, data), lambda step: ours.append(step.loss) is None)  # type: ignore[func-returns-value]
    theirs, balance = trl_figures(spec, data, tmp_path)
    assert len(ours) == len(theirs) == 4
    assert torch.tensor(ours) == pytest.approx(torch.tensor(theirs), rel=1e-6)
    assert all(one > 1 for one in balance), "the load-balancing loss is part of it"


def balance_of(spec: TrainSpec, folder: Path) -> tuple[float, float, torch.Tensor]:
    """(load-balancing loss, its part of a pass' loss, its part of an adapter's gradient), of one pass of a step."""
    job, base = TrainJob(spec, prepare(spec)), base_model.resolve(spec.base)
    set_seed(0)
    model = attach(base_model.load(base, spec.quant, device="cpu", purpose="train").model, spec.adapter)
    trainer: Any = build(TrainerContext(job, plan_of(job, 1), base, model, folder / "out", TrainerCallback())).trainer
    trainer.current_gradient_accumulation_steps = PASSES
    weights = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    losses, gradients = [], []
    for coefficient in (trainer.router_aux_loss_coef, 0.0):
        trainer.router_aux_loss_coef = model.config.router_aux_loss_coef = coefficient
        inputs = trainer.data_collator([{"row": row} for row in range(MICRO_BATCH)])
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(100))
        losses.append(loss.item())
        gradients.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)]))
    return step_figures(trainer)["aux_loss"][0], losses[0] - losses[1], gradients[0] - gradients[1]


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_a_distilled_student_has_the_loss_of_sft(kind: str, tmp_path: Path) -> None:
    write_family(tmp_path / "base", kind, router_aux_loss_coef=0.5)
    teacher = write_tiny_base(tmp_path / "teacher")
    write_rows(tmp_path / "train.jsonl", 16)
    write_rows(tmp_path / "eval.jsonl", 4, first=1000)
    keys = {"quant.kind": "none", "adapter": {"rank": 4}, "optim.micro_batch": MICRO_BATCH}
    found = []
    for objective in ({"kind": "sft"}, {"kind": "distill", "teacher": str(teacher)}):
        found.append(balance_of(task(tmp_path, **{**keys, "objective": objective}), tmp_path))
    (theirs, in_sft, sft_gradient), (ours, in_distill, gradient) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert in_distill == pytest.approx(0.5 * theirs / PASSES, rel=1e-6)
    assert in_distill == pytest.approx(in_sft, rel=1e-6)
    assert sft_gradient.norm() > 1e-6
    torch.testing.assert_close(gradient, sft_gradient, rtol=1e-4, atol=1e-6)
