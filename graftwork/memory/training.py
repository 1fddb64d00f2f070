"""Peak of one training worker: on a CPU its process, on a GPU what the process takes of the GPU."""

from graftwork.memory.activations import saved_bytes
from graftwork.memory.passes import Pass, beside_bytes, logit_bytes, passes_of
from graftwork.memory.sharing import Shared, shared
from graftwork.memory.sizes import BATCH_TOKENS, BF16, FP32, MIB, MemoryPlan, RowSizes
from graftwork.memory.weights import kv_bytes, largest_linear, loading_bytes, trained_params, weight_bytes
from graftwork.model_shape import ModelShape
from graftwork.training.adapter_spec import FullSpec, LoraSpec, PrefixSpec
from graftwork.training.spec import TrainSpec

PROCESS_BYTES = 660 * MIB
"""Peak of a worker that trains a base of 0.2 M parameters: Python 3.11, torch 2.13, transformers, PEFT, TRL,
bitsandbytes and Ray 2.60 on Linux x86-64 (`benchmarks/memory_plan.py`). 160 MiB of it are library pages that processes
share."""
ALLOCATOR_SHARE = 0.15
"""Freed temporaries between live activations that glibc does not return, as a share of activations and logits."""
CUDA_BYTES = 600 * MIB
"""CUDA's context, cuBLAS' workspaces and the kernels' code on one GPU, outside of torch's allocator."""
FRAGMENTS = 0.03
"""Of a GPU's allocated memory: blocks that torch's allocator cannot put together again."""
BETWEEN_STEPS = frozenset({"process", "base weights", "trained weights", "optimizer", "buffers", "loaded whole",
                           "unpacked layer", "teacher", "fragments", "CUDA"})  # fmt: skip
NEVER_AT_ONCE = "never at once"
"""Name of the part that is taken off again."""


def predict_training(
    spec: TrainSpec, model: ModelShape, rows: RowSizes | None = None, *, value_bytes: int = FP32
) -> MemoryPlan:
    """Peak of one training worker: the end of the forward pass over the longest rows, or the loading if that is more.

    `rows`: sizes of the rendered rows; without them every row is taken as `spec.max_length` long and half trained.
    `value_bytes` is of the compute dtype, as `base_model.compute_dtype` picks it. Raises BaseModelError for a base
    whose activations no formula predicts (`ModelShape.unplanned`).
    """
    model.require_planned(f"memory of {spec.name}")
    rows = rows or RowSizes.at_most(spec.max_length)
    predict = _on_gpu if spec.gpus else _on_cpu
    plans = [predict(spec, model, taken, value_bytes) for taken in passes_of(spec, rows, micro_batch(spec))]
    step = max(plans, key=lambda plan: plan.peak_bytes)
    return max(step, _measuring(spec, model, step, value_bytes), key=lambda plan: plan.peak_bytes)


def _measuring(spec: TrainSpec, model: ModelShape, step: MemoryPlan, value_bytes: int) -> MemoryPlan:
    """The peak while outcomes are measured: what stays between steps, and a forward pass of which all is scored."""
    outcomes = spec.outcomes
    if not (outcomes.task or outcomes.retention or outcomes.fairness):
        return step
    logits = BATCH_TOKENS * model.vocab * (value_bytes + 2 * FP32)  # then in fp32, and their log-softmax
    block = BATCH_TOKENS * (4 * model.hidden + 2 * model.q_size + 2 * model.kv_size + 3 * model.intermediate) * FP32
    past = kv_bytes(model, BATCH_TOKENS, value_bytes)
    stays = tuple((name, size) for name, size in step.parts if name in BETWEEN_STEPS)
    return MemoryPlan((*stays, ("outcomes", logits + max(block, past))), step.assumptions, step.host)


def _on_cpu(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> MemoryPlan:
    if isinstance(spec.adapter, FullSpec):
        value_bytes = FP32  # the trained weights are in fp32, and there is no autocast on a CPU
    block = saved_bytes(model, spec.adapter, _row(spec, taken), value_bytes=value_bytes)
    held, at_work = _activations(spec, model, taken, block, value_bytes)
    logits = logit_bytes(spec, model, taken, value_bytes)
    part = _shares(spec, model, value_bytes)
    step = {
        "trained weights": part.trained,
        "gradients": part.gradients + _added_gradients(spec, model, taken),
        "optimizer": part.optimizer,
        "buffers": part.buffers,
        "loaded whole": _loaded_whole(spec, part),
        "unpacked layer": _unpacked(spec, model, value_bytes, autocast=False),
        "activations": held + at_work,
        "logits": logits,
        **beside_bytes(spec, model, taken, value_bytes),
        "allocator": _allocator(spec, model, held + at_work + logits),
    }
    resident = {"process": PROCESS_BYTES, "base weights": part.weights}
    loading = {} if spec.quant.resident == "dequantised" else loading_bytes(model, spec.quant)
    parts = resident | (step if sum(step.values()) >= sum(loading.values()) else loading)
    notes = (taken.describe(), f"Python, PyTorch and Ray take {PROCESS_BYTES // MIB} MiB a process")
    return MemoryPlan(tuple((name, size) for name, size in parts.items() if size), notes)


def _added_gradients(spec: TrainSpec, model: ModelShape, taken: Pass) -> int:
    """Gradients of embedding and head that a pass adds to those of earlier passes, where all weights are trained.

    A tied weight gets two of them, one as the head and one as the embedding; those of other layers are small.
    """
    passes = spec.optim.rows_per_step // spec.num_workers // taken.rows
    return 2 * model.head_params * FP32 if passes > 1 and isinstance(spec.adapter, FullSpec) else 0


def _allocator(spec: TrainSpec, model: ModelShape, passing: int) -> int:
    """Freed memory that glibc does not give back, beside `passing` bytes of activations and logits.

    Where all weights are trained, gradients are freed after each step and come again between the activations of the
    next: whatever the rows, one fp32 copy of the weights is lost in pieces or filled with activations.
    """
    share = round(ALLOCATOR_SHARE * passing)
    return max(share, model.params * FP32 - passing) if isinstance(spec.adapter, FullSpec) else share


def _on_gpu(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> MemoryPlan:
    """Compute in 16 bits is autocast's: fp32 adapters are copied to 16 bits for as long as a pass lasts."""
    autocast = value_bytes == BF16
    row = _row(spec, taken)
    block = saved_bytes(model, spec.adapter, row, value_bytes=value_bytes, autocast=autocast, mask_bytes=1)
    held, at_work = _activations(spec, model, taken, block, value_bytes)
    part = _shares(spec, model, value_bytes)
    copies = trained_params(model, spec.adapter) * BF16 if autocast and spec.strategy.kind in ("ddp", "fsdp2") else 0
    backward = round(taken.tokens * _backward(model, value_bytes))
    logits = max(logit_bytes(spec, model, taken, value_bytes), backward)
    parts = {
        "base weights": part.weights,
        "trained weights": part.trained,
        "gradients": part.gradients,
        "optimizer": part.optimizer,
        "buffers": part.buffers,
        "16-bit copies": copies,
        "unpacked layer": _unpacked(spec, model, value_bytes, autocast=autocast),
        "activations": held + at_work,
        "logits and their gradients": logits,
        NEVER_AT_ONCE: -_never_at_once(spec, taken, part.gradients, held + logits + copies),
        **beside_bytes(spec, model, taken, value_bytes),
    }
    parts |= {"fragments": round(FRAGMENTS * sum(parts.values())), "CUDA": CUDA_BYTES}
    host = {"process": PROCESS_BYTES, "offloaded": part.host}
    return MemoryPlan(
        tuple((name, size) for name, size in parts.items() if size),
        (taken.describe(),),
        tuple((name, size) for name, size in host.items() if size),
    )


def _loaded_whole(spec: TrainSpec, part: Shared) -> int:
    """The shares of the others, which FSDP2 loads first and gives back: on a CPU to glibc, which keeps them."""
    return (spec.num_workers - 1) * (part.weights + part.trained) if spec.strategy.kind == "fsdp2" else 0


def allocated(plan: MemoryPlan) -> int:
    """What torch's allocator gives out at a GPU's peak (`torch.cuda.max_memory_allocated`)."""
    return plan.peak_bytes - plan.part("CUDA") - plan.part("fragments")


def _never_at_once(spec: TrainSpec, taken: Pass, gradients: int, held: int) -> int:
    """What of activations and gradients is not alive together: in the backward pass one takes the other's place.

    Where passes accumulate the gradients of one are there while the next keeps its activations; what a strategy shares
    lies in buffers of its own all the time. On a CPU both count: what glibc is given back it keeps, in pieces that the
    optimizer's first step fills (all weights of SmolLM2-135M: 3.38 GiB measured, 2.77 without the gradients).
    """
    passes = spec.optim.rows_per_step // spec.num_workers // taken.rows
    if passes > 1 or spec.strategy.kind != "ddp" or spec.num_workers > 1:
        return 0
    return min(gradients, held)


def _row(spec: TrainSpec, taken: Pass) -> int | None:
    """Tokens of a row where a mask is kept."""
    return taken.row if taken.masked or isinstance(spec.adapter, PrefixSpec) else None


def _activations(spec: TrainSpec, model: ModelShape, taken: Pass, block: float, value_bytes: int) -> tuple[int, int]:
    """(kept from the forward pass, one block computed again under checkpointing)."""
    ends = 2 * model.hidden * value_bytes
    if not spec.optim.gradient_checkpointing:
        return round(taken.tokens * (block * model.layers + ends)), 0
    inputs = model.layers * model.hidden * value_bytes
    return round(taken.tokens * (inputs + ends)), round(taken.tokens * block)


def _backward(model: ModelShape, value_bytes: int) -> float:
    """Bytes a token of the gradients alive at once in one block: of the MLP's inner activations and of two streams."""
    return (3 * model.intermediate + 2 * model.hidden) * value_bytes


def _shares(spec: TrainSpec, model: ModelShape, value_bytes: int) -> Shared:
    trained = trained_params(model, spec.adapter)
    plain = spec.quant.resident == "dequantised"
    base = weight_bytes(model, spec.quant, value_bytes, dequantised=plain)
    frozen = 0 if isinstance(spec.adapter, FullSpec) else base
    return shared(spec, model, frozen, trained)


def _unpacked(spec: TrainSpec, model: ModelShape, value_bytes: int, *, autocast: bool) -> int:
    """A quantised layer while it is multiplied; with DoRA an identity of its inputs, or four forms of the weight."""
    plain = spec.quant.kind == "none" or spec.quant.resident == "dequantised"
    layer = 0 if plain else largest_linear(model) * value_bytes
    if not (isinstance(spec.adapter, LoraSpec) and spec.adapter.dora):
        return layer
    targets = model.targets(spec.adapter.targets)
    identity = max(linear.inputs for linear in targets) ** 2 * (FP32 + BF16 * autocast)
    return layer + max(identity, 4 * FP32 * max(linear.params for linear in targets))


def micro_batch(spec: TrainSpec) -> int:
    """Rows of one forward pass on one worker: the largest divisor of its rows that `optim.micro_batch` allows."""
    per_worker = spec.optim.rows_per_step // spec.num_workers
    return max(size for size in range(1, min(spec.optim.rows_per_pass, per_worker) + 1) if per_worker % size == 0)
