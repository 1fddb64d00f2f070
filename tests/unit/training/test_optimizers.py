"""Optimizers and schedules: against torch's, bitsandbytes' and transformers' own, resumed, planned, refused."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from pydantic import ValidationError
from transformers import Adafactor, get_scheduler, set_seed

from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.errors import ConfigError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.loop import plan_of, run_steps
from graftwork.training.lr_schedule import scheduler_of
from graftwork.training.objectives.rows import prepare
from graftwork.training.optimizers import split_weights, state_bytes
from graftwork.training.planning.memory import predict_training
from graftwork.training.spec import OptimSpec, TrainSpec
from graftwork.training.worker_messages import StepReport, TrainJob
from tests.shapes import LLAMA_8B
from tests.training import task

WIDE = {"quant.kind": "none", "adapter.rank": 64, "num_workers": 1, "optim.micro_batch": 8}
"""Matrices of 4,096 values and more, whose states bitsandbytes keeps in 8 bits."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim.betas": [0.8, 0.95], "optim.eps": 1e-6, "optim.weight_decay": 0.1},
    "adamw_8bit": {"optim.betas": [0.8, 0.95], "optim.weight_decay": 0.1},
    "adafactor": {"optim.weight_decay": 0.1},
    "muon": {"optim.weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


def spec_of(folder: Path, kind: str, **changes: Any) -> TrainSpec:
    return task(folder, **{**WIDE, "optim.kind": kind, **OPTIMIZERS.get(kind, {}), **changes})


def reference(kind: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the spec of `OPTIMIZERS` names, of its own library."""
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(weights, 5e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        "adamw_8bit": lambda: AdamW8bit(weights, 5e-3, betas=(0.8, 0.95), weight_decay=0.1),
        "adafactor": lambda: Adafactor(weights, 5e-3, scale_parameter=False, relative_step=False, weight_decay=0.1),
        "muon": lambda: torch.optim.Muon(weights, 5e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    }
    return made[kind]()


def plain_losses(job: TrainJob, kind: str) -> list[float]:
    """A loop in plain torch over the same rows."""
    spec, plan = job.spec, plan_of(job, 1)
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    set_seed(spec.seed)
    model = attach(loaded.model, spec.adapter)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = reference(kind, weights)
    schedule = get_scheduler("linear", optimizer, math.ceil(spec.optim.warmup_ratio * plan.steps), plan.steps)
    losses = []
    for rows in plan.rows_SR:
        batch = job.data.train.collate(rows.tolist(), job.data.pad_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, spec.optim.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_losses_are_those_of_the_optimizer_in_plain_torch(folder: Path, kind: str) -> None:
    spec = spec_of(folder, kind)
    job = TrainJob(spec, prepare(spec))
    ours = [loss for _, loss in run_steps(job, lambda _: True).train_loss]
    assert len(ours) == 12
    assert ours == pytest.approx(plain_losses(job, kind), rel=1e-3 if kind == "adamw_8bit" else 2e-4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_stopped_run_goes_on_bit_by_bit(folder: Path, kind: str) -> None:
    spec = spec_of(folder, kind, **{"optim.schedule": "wsd", "optim.decay_ratio": 0.5})
    data = prepare(spec)
    whole = run_steps(TrainJob(spec, data), lambda _: True)
    paths = RunPaths(Store(str(folder / kind)), "colours", "0" * 64)
    run_steps(TrainJob(spec, data, paths), lambda step: step.step < 5)
    resumed = run_steps(TrainJob(spec, data, paths), lambda _: True)
    assert resumed.steps_this_attempt < whole.steps
    assert resumed.train_loss == whole.train_loss
    assert resumed.eval_loss == whole.eval_loss


def test_muon_steps_matrices_and_adamw_the_rest(folder: Path) -> None:
    """Embeddings, head and one-dimensional weights of a fully trained model have AdamW's two moments."""
    spec = task(folder, **{"quant.kind": "none", "adapter": {"kind": "full"}, "optim.kind": "muon", "optim.lr": 1e-4})
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    model = attach(loaded.model, spec.adapter)
    by_muon = {name for name, _, matrix in split_weights(model) if matrix}
    rest = {name for name, _, matrix in split_weights(model) if not matrix}
    assert len(by_muon) == 7 * model.config.num_hidden_layers
    assert all(name.endswith("proj.weight") for name in by_muon)
    assert "model.embed_tokens.weight" in rest
    assert all("norm" in name or "embed" in name for name in rest)
    result = run_steps(TrainJob(spec, prepare(spec), max_steps=4), lambda _: True)
    assert result.train_loss[-1][1] < result.train_loss[0][1]


def by_hand(schedule: str, done: int, steps: int, warmup: int) -> float:
    """Factor of the rate of the step after `done`, from the schedules' descriptions."""
    if schedule == "cosine_with_min_lr":
        if done < warmup:
            return done / warmup
        return 0.2 + 0.8 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2
    decay = math.ceil(0.25 * steps)
    if done < warmup:
        return 0.2 + 0.8 * done / warmup
    past = max(0, done - (steps - decay))
    return 0.2 + 0.8 * (1 + math.cos(math.pi * past / decay)) / 2


@pytest.mark.parametrize(("schedule", "decay"), [("cosine_with_min_lr", None), ("wsd", 0.25)])
def test_the_rates_are_transformers_and_the_formulas(folder: Path, schedule: str, decay: float | None) -> None:
    keys = {
        "optim.schedule": schedule,
        "optim.min_lr_ratio": 0.2,
        "optim.warmup_ratio": 0.2,
        "optim.decay_ratio": decay,
    }
    spec = spec_of(folder, "adamw", **{"adapter.rank": 4, **{key: value for key, value in keys.items() if value}})
    rates: list[float] = []

    def see(step: StepReport) -> bool:
        rates.append(step.lr)
        return True

    run_steps(TrainJob(spec, prepare(spec)), see)
    name = {"wsd": "warmup_stable_decay"}.get(schedule, schedule)
    kwargs = {"wsd": {"num_decay_steps": 3, "min_lr_ratio": 0.2}}.get(schedule, {"min_lr_rate": 0.2})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 5e-3)
    theirs = get_scheduler(name, optimizer, 3, 12, kwargs)
    expected = []
    for _ in range(12):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates == pytest.approx([5e-3 * by_hand(schedule, done, 12, 3) for done in range(12)], rel=1e-9)


def test_defaults_of_the_new_schedules() -> None:
    made = [scheduler_of(OptimSpec(schedule=one), 100).kwargs for one in ("cosine_with_min_lr", "wsd", "cosine")]
    assert made == [{"min_lr_rate": 0.1}, {"num_decay_steps": 10, "min_lr_ratio": 0.0}, {}]


def states(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's tensors, without the tables and counters that all weights share."""
    tables = ("qmap1", "qmap2", "step")
    found: Iterable[dict[str, Any]] = optimizer.state.values()
    return sum(v.nbytes for state in found for key, v in state.items() if torch.is_tensor(v) and key not in tables)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_plan_counts_the_state_that_the_optimizer_has(folder: Path, kind: str) -> None:
    """One step of the optimizer's own library on a LoRA of rank 64 on the tiny base."""
    spec = spec_of(folder, kind)
    resolved = base_model.resolve(spec.base)
    model = attach(base_model.load(resolved, spec.quant, device="cpu", purpose="train").model, spec.adapter)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = reference(kind, weights)
    optimizer.step()
    planned = state_bytes(spec, ModelShape.from_config(resolved.config))
    assert planned == pytest.approx(states(optimizer), rel=0.2)


def test_memory_plans_shrink_with_the_state(folder: Path) -> None:
    base = task(folder, **{"adapter": {"kind": "full"}, "quant.kind": "none", "optim.lr": 1e-5, "num_workers": 1})
    plans = {
        kind: predict_training(base.with_({"optim.kind": kind, "gpus_per_worker": 1}), LLAMA_8B).part("optimizer")
        for kind in ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon")
    }
    params = LLAMA_8B.params
    assert plans["adamw"] == 8 * params
    assert plans["adamw_8bit"] == plans["paged_adamw_8bit"]
    assert 2 * params < plans["adamw_8bit"] < 3 * params
    assert plans["adafactor"] < 0.01 * params
    assert 4 * params < plans["muon"] < 5 * params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.kind": "paged_adamw_8bit", "gpus_per_worker": 0}, "Set optim.kind=adamw_8bit"),
        ({"optim.kind": "muon", "strategy.kind": "fsdp2"}, "Set optim.kind=adamw or strategy.kind=ddp"),
        ({"optim.kind": "adafactor", "strategy.kind": "zero2"}, "can't go with strategy.kind=zero2"),
        ({"optim.kind": "adafactor", "optim.betas": [0.9, 0.99]}, "optim.betas and optim.eps can't take effect"),
        ({"optim.kind": "muon", "adapter": {"kind": "ia3"}}, "can't go with adapter.kind=ia3"),
        ({"optim.min_lr_ratio": 0.1}, "set optim.schedule=cosine_with_min_lr or wsd"),
        ({"optim.schedule": "cosine_with_min_lr", "optim.decay_ratio": 0.1}, "set optim.schedule=wsd"),
        ({"optim.schedule": "wsd", "optim.decay_ratio": 0.9, "optim.warmup_ratio": 0.2}, "more than the whole run"),
        ({"optim.kind": "adamw_torch"}, "Hint: use 'adamw'"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message.replace(".", r"\.")):
        task(folder, **changes)


def test_a_spec_without_the_new_keys_keeps_its_identity(folder: Path) -> None:
    before = {"lr", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "epochs", "rows_per_step"}
    assert task(folder).recipe()["optim"].keys() == before
    changed = spec_of(folder, "muon", **{"optim.schedule": "wsd", "optim.min_lr_ratio": 0.1}).recipe()["optim"]
    assert changed.keys() == before | {"kind", "min_lr_ratio"}
    assert "loss" in task(folder, objective={"kind": "dpo"}).recipe()["objective"]
