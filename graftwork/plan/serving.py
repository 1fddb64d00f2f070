"""Engine replicas: the memory of each when full, the seconds of its answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftwork.base_model import QuantSpec
from graftwork.memory import BF16, FP32, MIB, MemoryPlan, predict_serving
from graftwork.model_shape import ModelShape
from graftwork.plan.gpus import Gpu
from graftwork.plan.hardware import Machine
from graftwork.plan.seconds import START_S
from graftwork.plan.stage import StagePlan, verdict_of
from graftwork.serving.spec import EngineSpec

PROMPT_EFFICIENCY = 0.80
"""Of the probe's rate, in computing prompts."""
DECODE_EFFICIENCY = 0.26
"""Of the probe's rate, in products of few rows: 11.8 ms a row of SmolLM2-135M at 87 GFLOP/s."""
GPU_PROMPTS = 0.40
"""Of a GPU's dense rate, in computing prompts. Like the two below not measured with our engine: a first guess."""
GPU_READS = 0.50
"""Of its bandwidth, in reading the weights once a decoding step."""
GPU_LAYER_S = 1e-4
"""One block of one decoding step beside its products."""
LAYER_S = 1.7e-3
"""One block of one decoding step beside its products: Python, attention, the engine (one row: 81 ms a step)."""


@dataclass(frozen=True)
class RequestLoad:
    """Requests to one replica, on average."""

    count: int
    prompt_tokens: float
    new_tokens: float
    parts: tuple[str, ...] = ()
    """Kinds of requests that are counted, in words."""

    def describe(self) -> str:
        """Return the load as text."""
        parts = f": {', '.join(self.parts)}" if self.parts else ""
        whole = f"{self.count} requests, prompts of {self.prompt_tokens:.0f} tokens, answers of {self.new_tokens:.0f}"
        return f"{whole}{parts}"


def plan_serving(
    stage: str,
    model: ModelShape,
    quant: QuantSpec,
    engine: EngineSpec,
    machine: Machine,
    *,
    adapters: Sequence[int] = (),
    dequantised: bool = False,
    answers: RequestLoad | None = None,
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
            value_bytes=machine.value_bytes, kv_value_bytes=None if machine.gpu else FP32, cuda=machine.gpu is not None,
        )  # fmt: skip
        beside = sum(one.peak_bytes - one.part("process") for one in query_embedders)
        return replace(plan, parts=(*plan.parts, ("query embedders", beside))) if beside else plan

    def needed(plan: MemoryPlan) -> int:
        return plan.peak_bytes if machine.gpu else replicas * plan.peak_bytes + beside

    memory = memory_with(engine.kv_tokens)
    halves = (engine.kv_tokens // 2**power for power in range(1, 6))
    ways_out = ((f"engine.kv_tokens={n}", needed(memory_with(n))) for n in halves if n >= engine.max_seq_len)
    answer_s = answers_seconds(answers, model, engine, machine, num_cpus) if answers else 0.0
    return StagePlan(
        stage=stage,
        processes=replicas + (embedder is not None),
        peak_bytes_per_process=memory.peak_bytes,
        total_bytes=replicas * memory.peak_bytes + beside,
        seconds=START_S + answer_s,
        verdict=verdict_of(needed(memory), machine, ways_out),
        parts=memory.parts,
        assumptions=(
            *((answers.describe(),) if answers else ()),
            *((f"the embedder takes {beside // MIB} MiB in a process of its own",) if embedder else ()),
            *memory.assumptions,
            machine.describe(),
        ),
        host_bytes_per_process=memory.host_bytes,
    )


def answers_seconds(
    answers: RequestLoad, model: ModelShape, engine: EngineSpec, machine: Machine, num_cpus: float
) -> float:
    """Prompts computed and answers decoded in full batches by one replica."""
    if machine.gpu is not None:
        return _gpu_seconds(answers, model, engine, machine, machine.gpu)
    pace = machine.pace(1, min(engine.num_threads or num_cpus, machine.cores))
    prompt_flops = 2 * model.linear_params * answers.count * answers.prompt_tokens
    batch = min(engine.max_batch, answers.count)
    steps = answers.count * answers.new_tokens / batch
    token_flops = 2 * (model.linear_params + model.head_params)
    weights_s = (model.linear_params + model.head_params) * machine.value_bytes / (machine.speed.gbytes_per_s * 1e9)
    rows_s = machine.core_s(batch * token_flops, DECODE_EFFICIENCY) / pace
    step_s = model.layers * LAYER_S + weights_s + rows_s
    return machine.core_s(prompt_flops, PROMPT_EFFICIENCY) / pace + steps * step_s


def _gpu_seconds(answers: RequestLoad, model: ModelShape, engine: EngineSpec, machine: Machine, gpu: Gpu) -> float:
    """A decoding step reads all weights once, whatever the number of its rows, until their products take longer."""
    rate = (gpu.tflops if machine.value_bytes == BF16 else gpu.fp32_tflops) * 1e12
    prompts_s = 2 * model.linear_params * answers.count * answers.prompt_tokens / (rate * GPU_PROMPTS)
    batch = min(engine.max_batch, answers.count)
    weights = model.linear_params + model.head_params
    reads_s = weights * machine.value_bytes / (gpu.gbytes_per_s * 1e9 * GPU_READS)
    step_s = max(reads_s, batch * 2 * weights / (rate * GPU_PROMPTS)) + model.layers * GPU_LAYER_S
    return prompts_s + answers.count * answers.new_tokens / batch * step_s
