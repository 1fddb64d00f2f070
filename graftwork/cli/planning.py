"""What each stage will take, from its spec and the model's config: memory per process and time, before anything starts.

Memory is the closed form of `graftwork.memory`; time is FLOPs over this machine's measured rate.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from graftwork import base_model
from graftwork.base_model import BaseSpec, QuantSpec, has_fused_nf4
from graftwork.config import Spec
from graftwork.data import read_rows
from graftwork.demo.specs import load_specs
from graftwork.demo_spec import DemoSpec
from graftwork.memory import FP32, MemoryPlan, ModelShape, kv_bytes, saved_values, weight_bytes
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import EngineSpec, ServeSpec
from graftwork.training.data import PreparedData, prepare
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec

MIB = 2**20
WORKER_BYTES = 760 * MIB
"""Python, torch, transformers, TRL and Ray in a training worker before the model; measured on Linux, CPU builds."""
ENGINE_BYTES = 640 * MIB
"""The same in an engine replica, with its tokenizer and index."""
START_S = 14.0
"""Starting workers or a replica, and loading the base."""
TRAIN_EFFICIENCY, PREFILL_EFFICIENCY, DECODE_EFFICIENCY = 0.62, 0.75, 0.45
"""Shares of the measured matmul rate that the stages reach (SmolLM2-135M on two AVX2 cores)."""


@dataclass(frozen=True)
class PlanLine:
    """One stage. Memory is of one process; `total_bytes` of all its processes together."""

    stage: str
    processes: int
    peak_bytes_per_process: int
    total_bytes: int
    seconds: float
    verdict: str
    assumptions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def plan_spec(spec: Spec, folder: Path) -> list[PlanLine]:
    """A line a stage. Raises UserError as the stage itself would: a bad row, a base that cannot be resolved."""
    return list(_lines(spec, folder))


def _lines(spec: Spec, folder: Path) -> Iterator[PlanLine]:
    if isinstance(spec, TrainSpec):
        yield plan_training(spec)
    elif isinstance(spec, TuneSpec):
        yield plan_sweep(spec)
    elif isinstance(spec, ServeSpec):
        yield plan_serving("serve", spec.base, spec.quant, spec.engine, 0.0)
    elif isinstance(spec, CompareSpec):
        yield plan_comparison(spec)
    elif isinstance(spec, DemoSpec):
        specs = load_specs(spec, folder)
        for stage in (specs.tune, *specs.train, specs.serve, specs.compare):
            yield from _lines(stage, folder)


def plan_training(spec: TrainSpec) -> PlanLine:
    """All workers of one run."""
    data = prepare(spec)
    memory = training_memory(spec, data)
    epochs = spec.optim.epochs
    held_out = _tokens(data)[1] * max(1, round(epochs * len(data.train) / spec.optim.rows_per_step / spec.eval_every))
    flops = _training_flops(spec, data) * epochs + 2 * _shape(spec.base).linear_params * held_out
    seconds = START_S + flops / (_gflops() * 1e9 * TRAIN_EFFICIENCY)
    return _line(f"train {spec.name}", spec.num_workers, memory, seconds)


def plan_sweep(spec: TuneSpec) -> PlanLine:
    """Trials side by side, none stopped early: the upper bound."""
    data = prepare(spec.train)
    memory = training_memory(spec.train, data)
    share = spec.steps * spec.train.optim.rows_per_step / len(data.train)
    together = min(spec.max_concurrent, spec.num_trials, psutil.cpu_count() or 1)
    flops = spec.num_trials * share * _training_flops(spec.train, data)
    seconds = START_S * spec.num_trials / together + flops / (_gflops() * 1e9 * TRAIN_EFFICIENCY)
    return _line("tune", together, memory, seconds)


def plan_comparison(spec: CompareSpec) -> PlanLine:
    """Prompts of about 25 tokens and 30 a passage, answers of about 45; the run counts the real ones."""
    rows = len(read_rows(spec.eval, limit=spec.limit, need="eval"))
    prompt = sum(25 + 30 * (arm.retriever.k if arm.retriever else 0) for arm in spec.arms) * rows
    answer = 45 * len(spec.arms) * rows
    per_token = 2 * _shape(spec.base).linear_params
    head = 2 * _shape(spec.base).head_params
    rate = _gflops() * 1e9
    seconds = prompt * per_token / (rate * PREFILL_EFFICIENCY) + answer * (per_token + head) / (
        rate * DECODE_EFFICIENCY
    )
    return plan_serving("compare", spec.base, spec.quant, spec.engine, seconds)


def plan_serving(stage: str, base: BaseSpec, quant: QuantSpec, engine: EngineSpec, seconds: float) -> PlanLine:
    """One engine replica with its whole KV memory in use. Serving has no end: its seconds are those until ready."""
    shape = _shape(base)
    plain = quant.kind == "nf4" and quant.resident != "packed" and not has_fused_nf4("cpu")
    slots = engine.max_loaded * shape.adapter_params(min(16, engine.max_rank)) * FP32
    parts = (
        ("process", ENGINE_BYTES),
        ("weights", weight_bytes(shape, quant, dequantised=plain)),
        ("kv", kv_bytes(shape, engine.kv_tokens)),
        ("adapters", slots),
    )
    return _line(stage, 1, MemoryPlan(parts), seconds or START_S)


def training_memory(spec: TrainSpec, data: PreparedData) -> MemoryPlan:
    """One worker, at its largest micro-batch."""
    shape = _shape(spec.base)
    longest = sorted((len(data.train.row(i)[0]) for i in range(len(data.train))), reverse=True)
    width = longest[0]
    per_worker = max(1, spec.optim.rows_per_step // spec.num_workers)
    rows = min(spec.optim.micro_batch, per_worker)
    scored = max(int(data.train.row(i)[1].sum()) for i in range(len(data.train))) * rows
    adapter = shape.adapter_params(spec.adapter.rank, spec.adapter.targets) * FP32
    largest = max(linear.params for linear in shape.attention + shape.mlp) * FP32
    parts = (
        ("process", WORKER_BYTES),
        ("weights", weight_bytes(shape, spec.quant)),
        ("adapter, gradients, Adam", 4 * adapter),
        ("activations", shape.layers * rows * width * saved_values(shape, spec.adapter) * FP32),
        ("logits", 3 * scored * shape.vocab * FP32),
        ("dequantised weight", 2 * largest if spec.quant.kind != "none" else 0),
    )
    return MemoryPlan(parts)


def _training_flops(spec: TrainSpec, data: PreparedData) -> float:
    """One pass over the rows: 4 N a token (frozen weights get no gradient of their own) and 6 of the adapter's."""
    shape = _shape(spec.base)
    tokens, _ = _tokens(data)
    scored = int(data.train.trained_T.sum())
    adapter = shape.adapter_params(spec.adapter.rank, spec.adapter.targets)
    return float(tokens * (4 * shape.linear_params + 6 * adapter) + scored * 4 * shape.head_params)


def _tokens(data: PreparedData) -> tuple[int, int]:
    return len(data.train.ids_T), len(data.eval.ids_T) if data.eval is not None else 0


def _line(stage: str, processes: int, memory: MemoryPlan, seconds: float) -> PlanLine:
    total = processes * memory.peak_bytes
    have = psutil.virtual_memory().total
    verdict = "yes" if total < 0.9 * have else f"no: {total / 2**30:.1f} of {have / 2**30:.1f} GiB"
    parts = ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in memory.parts if size)
    return PlanLine(stage, processes, memory.peak_bytes, total, seconds, verdict, (f"{stage}: {parts}",))


@cache
def _shape(base: BaseSpec) -> ModelShape:
    return ModelShape.from_config(base_model.resolve(base).config)


@cache
def _gflops() -> float:
    """This machine's fp32 matmul rate in GFLOP/s over all cores, measured for a fifth of a second."""
    import torch

    a, b = torch.randn(512, 576), torch.randn(576, 1536)
    a @ b
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        a @ b
        count += 1
    return count * 2 * 512 * 576 * 1536 / (time.perf_counter() - started) / 1e9
