"""Predicts seconds from the model's operations and the machine's measured speed, and says whether a stage fits.

Operations: a product of weights costs 2 a weight and token forward and 2 backward for the input's gradient; frozen
weights need no gradient, so LoRA takes 4N a token where full finetuning takes 6N. Efficiencies are shares of the
probe's matmul rate (`machine.measure_speed`), calibrated with `benchmarks/memory_plan.py` on SmolLM2-135M.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from graftwork.base_model import QuantSpec
from graftwork.machine import Speed, available_memory, cores, measure_speed
from graftwork.memory import FP32, GIB, MIB, MemoryPlan, RowSizes, micro_batch, predict_serving, predict_training
from graftwork.model_shape import ModelShape
from graftwork.serving.spec import EngineSpec
from graftwork.training.spec import TrainSpec, as_lora

TRAIN_EFFICIENCY = 0.70
"""Of the probe's rate, in a training step: smaller products, element-wise work, autograd."""
PROMPT_EFFICIENCY = 0.80
"""Of the probe's rate, in computing prompts."""
DECODE_EFFICIENCY = 0.26
"""Of the probe's rate, in products of few rows: 11.8 ms a row of SmolLM2-135M at 87 GFLOP/s."""
UNPACK_PER_S = 1.0e9
"""nf4 weights that one core unpacks a second (bitsandbytes 0.50, AVX2)."""
DROPPED_PER_S = 38e6
"""Values that pass the adapters' dropout in one core's second: PyTorch draws them one by one on a CPU."""
BF16_GAIN = 2.0
"""More than this times its fp32 rate a CPU's bf16 units do not make a step faster: the rest of it takes the time."""
CROWDED = 0.35
"""How much slower each core is when all work: caches, memory and clock are shared (two processes 1.35, two threads 1.23
times on 2 vCPUs)."""
LAYER_S = 1.7e-3
"""One block of one decoding step beside its products: Python, attention, the engine (one row: 81 ms a step)."""
START_S = 10.0
"""CPU seconds of a process from its start to its first step: imports (8.5), the base, the trainer."""
RAY_TRAIN_START_S = 10.0
"""Until Ray Train's controller has called the workers: 7 to 9 s on 2 cores."""
RAY_TUNE_START_S = 4.0
"""Until Ray Tune has started its first trials."""
PADDING = 1.04
"""Padded over real tokens: rows of a step are sorted by length."""
HEADROOM = 0.95
"""Share of the available memory that a plan may take."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take, before it starts."""

    stage: str
    processes: int
    peak_bytes_per_process: int
    total_bytes: int
    seconds: float
    verdict: str
    """`fits`, or `needs 9.1 of 8.0 GiB; fits with optim.micro_batch=2`."""
    parts: tuple[tuple[str, int], ...]
    """Bytes of one process, by name."""
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "parts": dict(self.parts)}


@dataclass(frozen=True)
class Answers:
    """Requests to one replica, on average."""

    count: int
    prompt_tokens: float
    new_tokens: float

    def said(self) -> str:
        """In words."""
        return f"{self.count} answers of {self.new_tokens:.0f} tokens to prompts of {self.prompt_tokens:.0f}"


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. `value_bytes`: 4 where the compute dtype is fp32, 2 for bf16."""

    cores: int
    memory_bytes: int
    speed: Speed
    value_bytes: int = FP32

    @classmethod
    def here(cls, value_bytes: int = FP32) -> "Machine":
        """This machine as it is now. Probes its speed the first time."""
        return cls(cores(), available_memory(), measure_speed(), value_bytes)

    def said(self) -> str:
        """In words."""
        speed = f"{self.gflops:.0f} GFLOP/s a core, {self.speed.gbytes_per_s:.0f} GB/s"
        return f"{self.cores} cores, {speed}, {self.memory_bytes / GIB:.1f} GiB available"

    @property
    def gflops(self) -> float:
        """10^9 operations a second of one core in the compute dtype, as far as they count."""
        if self.value_bytes == FP32 or self.speed.bf16_gflops is None:
            return self.speed.gflops
        return min(self.speed.bf16_gflops, BF16_GAIN * self.speed.gflops)

    def core_s(self, flops: float, efficiency: float) -> float:
        """Seconds of one core."""
        return flops / (self.gflops * 1e9 * efficiency)

    def pace(self, processes: int, cpus: float) -> float:
        """Speed of one of `processes` processes of `cpus` CPUs each, all at work; 1 is one thread that runs alone."""
        threads = max(1, int(cpus))
        busy = min(processes * threads, self.cores)
        crowded = 1 + CROWDED * (busy - 1) / (self.cores - 1) if self.cores > 1 else 1.0
        return threads * min(1.0, self.cores / (processes * threads)) / crowded


def training_flops(spec: TrainSpec, model: ModelShape, tokens: float, scored: float, row: float) -> float:
    """Operations of a forward and a backward pass over `tokens` tokens in rows of `row`, `scored` of them scored."""
    lora = as_lora(spec.adapter, "seconds of a step")
    adapter = model.adapter_params(lora.rank, lora.targets)
    attention = model.layers * 14 * row * model.q_size  # 4 forward; backward 10, as it computes the scores again
    return tokens * (4 * model.linear_params + 6 * adapter + attention) + scored * 4 * model.head_params


def step_seconds(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine, processes: int) -> float:
    """One optimizer step of one worker while `processes` such processes run."""
    per_worker = spec.optim.rows_per_step // spec.num_workers
    tokens = per_worker * rows.mean * PADDING
    flops = training_flops(spec, model, tokens, per_worker * rows.mean_trained, rows.mean)
    passes = per_worker / micro_batch(spec)
    unpack_s = 2 * passes * model.linear_params / UNPACK_PER_S if spec.quant.kind == "nf4" else 0.0
    lora = as_lora(spec.adapter, "seconds of a step")
    inputs = sum(linear.inputs for linear in model.targets(lora.targets)) if lora.dropout else 0
    dropout_s = tokens * model.layers * inputs / DROPPED_PER_S
    return (machine.core_s(flops, TRAIN_EFFICIENCY) + unpack_s + dropout_s) / machine.pace(
        processes, spec.cpus_per_worker
    )


def evaluation_seconds(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine, processes: int) -> float:
    """The held-out loss over `rows`, shared among a run's workers: forward passes alone."""
    flops = rows.count * (rows.mean * PADDING * 2 * model.linear_params + rows.mean_trained * 2 * model.head_params)
    return machine.core_s(flops / spec.num_workers, TRAIN_EFFICIENCY) / machine.pace(processes, spec.cpus_per_worker)


def plan_training(
    spec: TrainSpec, model: ModelShape, rows: RowSizes, held_out: RowSizes | None, machine: Machine
) -> StagePlan:
    """A run of `train`. `rows` and `held_out`: sizes of the rendered rows."""
    steps = max(1, math.ceil(spec.optim.epochs * rows.count / spec.optim.rows_per_step - 1e-9))
    evals = math.ceil(steps / spec.eval_every)
    eval_s = evaluation_seconds(spec, model, held_out, machine, spec.num_workers) if held_out else 0.0
    start_s = RAY_TRAIN_START_S + START_S / machine.pace(spec.num_workers, 1)
    memory = predict_training(spec, model, rows, value_bytes=machine.value_bytes)
    return StagePlan(
        stage=f"train {spec.name}",
        processes=spec.num_workers,
        peak_bytes_per_process=memory.peak_bytes,
        total_bytes=memory.peak_bytes * spec.num_workers,
        seconds=start_s + steps * step_seconds(spec, model, rows, machine, spec.num_workers) + evals * eval_s,
        verdict=verdict_of(
            memory.peak_bytes * spec.num_workers, machine, training_ways_out(spec, model, rows, machine)
        ),
        parts=memory.parts,
        assumptions=(f"{steps} steps of {spec.optim.rows_per_step} rows", *memory.assumptions, machine.said()),
    )


def training_ways_out(
    spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine
) -> Iterator[tuple[str, int]]:
    """(a setting, bytes in all with it): single changes, the cheapest first."""

    def total(changed: TrainSpec, sizes: RowSizes = rows) -> int:
        return predict_training(changed, model, sizes, value_bytes=machine.value_bytes).peak_bytes * changed.num_workers

    size = micro_batch(spec)
    while size > 1:
        size //= 2
        yield f"optim.micro_batch={size}", total(spec.with_({"optim.micro_batch": size}))
    if spec.quant.kind != "nf4":
        yield "quant.kind=nf4", total(spec.with_({"quant": {"kind": "nf4"}}))
    for workers in range(spec.num_workers - 1, 0, -1):
        if spec.optim.rows_per_step % workers == 0:
            yield f"num_workers={workers}", total(spec.with_({"num_workers": workers}))
    for share in (0.75, 0.5, 0.25):
        length = int(rows.longest * share)
        shorter = replace(rows, longest=length, longest_trained=min(length, rows.longest_trained))
        yield f"max_length={length} (longer rows are dropped)", total(spec, shorter)


def plan_serving(
    stage: str,
    model: ModelShape,
    quant: QuantSpec,
    engine: EngineSpec,
    machine: Machine,
    *,
    adapters: Sequence[int] = (),
    dequantised: bool = False,
    answers: Answers | None = None,
    num_cpus: float = 1.0,
    replicas: int = 1,
    embedder: MemoryPlan | None = None,
    query_embedders: Sequence[MemoryPlan] = (),
) -> StagePlan:
    """Engine replicas: the memory of each when full, and the time of `answers` on one after its start.

    `adapters`: ranks of the versions loaded. `dequantised`: nf4 kept as plain values. `embedder`: of its own process.
    `query_embedders`: those that arms with vectors load into each replica.
    """
    beside = embedder.peak_bytes if embedder else 0

    def memory_with(kv_tokens: int) -> MemoryPlan:
        fewer = engine.model_copy(update={"kv_tokens": kv_tokens})
        plan = predict_serving(
            model, quant, fewer, adapters=adapters, dequantised=dequantised,
            value_bytes=machine.value_bytes, kv_value_bytes=FP32,
        )  # fmt: skip
        beside = sum(one.peak_bytes - one.part("process") for one in query_embedders)
        return replace(plan, parts=(*plan.parts, ("query embedders", beside))) if beside else plan

    memory = memory_with(engine.kv_tokens)
    halves = (engine.kv_tokens // 2**power for power in range(1, 6))
    ways_out = (
        (f"engine.kv_tokens={n}", replicas * memory_with(n).peak_bytes + beside)
        for n in halves
        if n >= engine.max_seq_len
    )
    total_bytes = replicas * memory.peak_bytes + beside
    answer_s = answers_seconds(answers, model, engine, machine, num_cpus) if answers else 0.0
    return StagePlan(
        stage=stage,
        processes=replicas + (embedder is not None),
        peak_bytes_per_process=memory.peak_bytes,
        total_bytes=total_bytes,
        seconds=START_S + answer_s,
        verdict=verdict_of(total_bytes, machine, ways_out),
        parts=memory.parts,
        assumptions=(
            *((answers.said(),) if answers else ()),
            *((f"the embedder takes {beside // MIB} MiB in a process of its own",) if embedder else ()),
            *memory.assumptions,
            machine.said(),
        ),
    )


def answers_seconds(
    answers: Answers, model: ModelShape, engine: EngineSpec, machine: Machine, num_cpus: float
) -> float:
    """Prompts computed and answers decoded in full batches by one replica."""
    pace = machine.pace(1, min(engine.num_threads or num_cpus, machine.cores))
    prompt_flops = 2 * model.linear_params * answers.count * answers.prompt_tokens
    batch = min(engine.max_batch, answers.count)
    steps = answers.count * answers.new_tokens / batch
    token_flops = 2 * (model.linear_params + model.head_params)
    weights_s = (model.linear_params + model.head_params) * machine.value_bytes / (machine.speed.gbytes_per_s * 1e9)
    rows_s = machine.core_s(batch * token_flops, DECODE_EFFICIENCY) / pace
    step_s = model.layers * LAYER_S + weights_s + rows_s
    return machine.core_s(prompt_flops, PROMPT_EFFICIENCY) / pace + steps * step_s


def verdict_of(total_bytes: int, machine: Machine, ways_out: Iterable[tuple[str, int]]) -> str:
    """`fits`, or what it needs of what there is and the nearest single change that fits."""
    limit = HEADROOM * machine.memory_bytes
    if total_bytes <= limit:
        return "fits"
    needs = f"needs {total_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB"
    way_out = next((setting for setting, size in ways_out if size <= limit), None)
    return f"{needs}; fits with {way_out}" if way_out else f"{needs}; no single change fits: take a smaller base"
