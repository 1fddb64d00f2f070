"""Peak of one training worker: on a CPU its process, on a GPU what the process takes of the GPU."""

from graftwork.memory.activations import saved_bytes
from graftwork.memory.passes import Pass, beside_bytes, logit_bytes, pass_of
from graftwork.memory.sharing import Shared, shared
from graftwork.memory.sizes import BF16, FP32, MIB, MemoryPlan, RowSizes
from graftwork.memory.weights import largest_linear, loading_bytes, trained_params, weight_bytes
from graftwork.model_shape import ModelShape
from graftwork.training.adapter_spec import FullSpec, LoraSpec, PrefixSpec
from graftwork.training.spec import TrainSpec

PROCESS_BYTES = 625 * MIB
"""Peak of a worker that trains a base of 0.2 M parameters: Python 3.11, torch 2.13, transformers, PEFT, TRL,
bitsandbytes and Ray 2.60 on Linux x86-64 (`benchmarks/memory_plan.py`). 160 MiB of it are library pages that processes
share."""
ALLOCATOR_SHARE = 0.2
"""Freed temporaries between live activations that glibc does not return, as a share of activations and logits."""
CUDA_BYTES = 600 * MIB
"""CUDA's context, cuBLAS' workspaces and the kernels' code on one GPU, outside of torch's allocator."""
FRAGMENTS = 0.03
"""Of a GPU's allocated memory: blocks that torch's allocator cannot put together again."""


def predict_training(
    spec: TrainSpec, model: ModelShape, rows: RowSizes | None = None, *, value_bytes: int = FP32
) -> MemoryPlan:
    """Peak of one training worker: the end of the forward pass over the longest rows, or the loading if that is more.

    `rows`: sizes of the rendered rows; without them every row is taken as `spec.max_length` long and half trained.
    `value_bytes` is of the compute dtype, as `base_model.compute_dtype` picks it.
    """
    rows = rows or RowSizes.at_most(spec.max_length)
    taken = pass_of(spec, rows, micro_batch(spec))
    predict = _on_gpu if spec.gpus_per_worker else _on_cpu
    return predict(spec, model, taken, value_bytes)


def _on_cpu(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> MemoryPlan:
    if isinstance(spec.adapter, FullSpec):
        value_bytes = FP32  # the trained weights are in fp32, and there is no autocast on a CPU
    block = saved_bytes(model, spec.adapter, _row(spec, taken), value_bytes=value_bytes)
    held, at_work = _activations(spec, model, taken, block, value_bytes)
    logits = logit_bytes(spec, model, taken, value_bytes)
    part = _shares(spec, model, value_bytes)
    step = {
        "trained weights": part.trained,
        "gradients": part.gradients,
        "optimizer": part.optimizer,
        "buffers": part.buffers,
        "unpacked layer": _unpacked(spec, model, value_bytes),
        "activations": held + at_work,
        "logits": logits,
        **beside_bytes(spec, model, taken, value_bytes),
        "allocator": round(ALLOCATOR_SHARE * (held + at_work + logits)),
    }
    resident = {"process": PROCESS_BYTES, "base weights": part.weights}
    loading = {} if spec.quant.resident == "dequantised" else loading_bytes(model, spec.quant)
    parts = resident | (step if sum(step.values()) >= sum(loading.values()) else loading)
    notes = (taken.said(), f"Python, PyTorch and Ray take {PROCESS_BYTES // MIB} MiB a process")
    return MemoryPlan(tuple((name, size) for name, size in parts.items() if size), notes)


def _on_gpu(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> MemoryPlan:
    """Compute in 16 bits is autocast's: fp32 adapters are copied to 16 bits for as long as a pass lasts."""
    autocast = value_bytes == BF16
    row = _row(spec, taken)
    block = saved_bytes(model, spec.adapter, row, value_bytes=value_bytes, autocast=autocast, mask_bytes=1)
    held, at_work = _activations(spec, model, taken, block, value_bytes)
    part = _shares(spec, model, value_bytes)
    trained = trained_params(model, spec.adapter)
    backward = round(taken.tokens * _backward(model, value_bytes))
    parts = {
        "base weights": part.weights,
        "trained weights": part.trained,
        "gradients": part.gradients,
        "optimizer": part.optimizer,
        "buffers": part.buffers + (trained * BF16 if autocast and spec.strategy.kind in ("ddp", "fsdp2") else 0),
        "unpacked layer": _unpacked(spec, model, value_bytes),
        "activations": held + at_work,
        "logits and gradients": max(logit_bytes(spec, model, taken, value_bytes), backward),
        **beside_bytes(spec, model, taken, value_bytes),
    }
    parts |= {"fragments": round(FRAGMENTS * sum(parts.values())), "CUDA": CUDA_BYTES}
    host = {"process": PROCESS_BYTES, "offloaded": part.host}
    return MemoryPlan(
        tuple((name, size) for name, size in parts.items() if size),
        (taken.said(),),
        tuple((name, size) for name, size in host.items() if size),
    )


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


def _unpacked(spec: TrainSpec, model: ModelShape, value_bytes: int) -> int:
    """A quantised layer while it is multiplied; with DoRA the update's product and three forms of the weight."""
    plain = spec.quant.kind == "none" or spec.quant.resident == "dequantised"
    layer = 0 if plain else largest_linear(model) * value_bytes
    if isinstance(spec.adapter, LoraSpec) and spec.adapter.dora:
        layer += 4 * max(linear.inputs * max(linear.inputs, linear.outputs) for linear in model.mlp) * FP32
    return layer


def micro_batch(spec: TrainSpec) -> int:
    """Rows of one forward pass on one worker: the largest divisor of its rows that `optim.micro_batch` allows."""
    per_worker = spec.optim.rows_per_step // spec.num_workers
    return max(size for size in range(1, min(spec.optim.rows_per_pass, per_worker) + 1) if per_worker % size == 0)
