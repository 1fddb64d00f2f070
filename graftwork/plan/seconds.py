"""A short roofline: seconds of a training step from its operations and bytes, on this machine's cores or on a GPU."""

from dataclasses import replace

from graftwork.memory import RowSizes, micro_batch
from graftwork.memory.sizes import BF16, FP32, TokenWork
from graftwork.memory.weights import trained_params
from graftwork.model_shape import ModelShape
from graftwork.plan.gpus import Gpu
from graftwork.plan.hardware import Machine
from graftwork.training.adapter_spec import FullSpec, LoraSpec, PrefixSpec
from graftwork.training.spec import TrainSpec

TRAIN_EFFICIENCY = 0.70
"""Of the probe's rate, in a training step: smaller products, element-wise work, autograd."""
UNPACK_PER_S = 1.0e9
"""nf4 weights that one core unpacks a second (bitsandbytes 0.50, AVX2)."""
DROPPED_PER_S = 38e6
"""Values that pass the adapters' dropout in one core's second: PyTorch draws them one by one on a CPU."""
PASS_BLOCK_S = 2e-3
"""One block of one forward and backward pass beside its products, in a core's second: Python, autograd."""
START_S = 10.0
"""CPU seconds of a process from its start to its first step: imports (8.5), the base, the trainer."""
RAY_TRAIN_START_S = 10.0
"""Until Ray Train's controller has called the workers: 7 to 9 s on 2 cores."""
RAY_TUNE_START_S = 4.0
"""Until Ray Tune has started its first trials."""
PADDING = 1.04
"""Padded over real tokens: rows of a step are sorted by length."""

GPU_LORA, GPU_FULL = 0.34, 0.50
"""Of a GPU's dense rate. On one H100 (8B, 2,048 tokens): LoRA 0.33 with and 0.35 without checkpointing, QLoRA 0.37; all
weights of 1.2B 0.50 (`docs/log.md`)."""
GPU_MEMORY = 0.75
"""Of a GPU's memory bandwidth, in element-wise work and unpacking."""
LAUNCH_BLOCK_S = 4.5e-3
"""A block's forward and backward pass takes no less: Python starts its kernels one by one (1.5 ms forward)."""
ADAM_BYTES = 28
"""Read and written of one trained value in a step: weight, gradient and two moments in fp32."""
CPU_ADAM_BYTES = ADAM_BYTES + 12
"""On a CPU, with the norm of the gradients and their clipping, which pass over them once and twice."""
DECODE_BLOCK_S, GPU_DECODE_BLOCK_S = 4e-3, 5e-4
"""One block of one step of transformers' generate beside its products, with an adapter: Python, the cache."""
DECODE_EFFICIENCY = 0.26
"""Of the probe's rate, in products of few rows."""
LINK_EFFICIENCY = 0.63
"""Of a link's rate in one direction, in collectives (20 GB/s over PCIe 4 x16); nothing overlaps with the computing."""


def training_flops(spec: TrainSpec, model: ModelShape, tokens: float, scored: float, row: float) -> float:
    """Operations of a forward and a backward pass over `tokens` tokens in rows of `row`, `scored` of them scored."""
    full, again = isinstance(spec.adapter, FullSpec), bool(spec.optim.gradient_checkpointing)
    keys = row + (spec.adapter.tokens if isinstance(spec.adapter, PrefixSpec) else 0)
    # attention: 4 forward; backward 10, as it computes the scores again
    attention = model.layers * (14 + 4 * again) * keys * model.q_size
    weights = (6 if full else 4) + 2 * again
    added = 0 if full else 6 * trained_params(model, spec.adapter)
    head = (6 if full else 4) * model.head_params
    return tokens * (weights * model.linear_params + added + attention) + scored * head


def step_seconds(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine, processes: int) -> float:
    """One optimizer step of one worker while `processes` such processes run."""
    per_worker = spec.optim.rows_per_step // spec.num_workers
    passes = per_worker / micro_batch(spec)
    tokens = per_worker * rows.mean * (PADDING if rows.padded else 1.0)
    flops = training_flops(spec, model, tokens, per_worker * rows.mean_trained, rows.mean)
    flops += passes * _magnitude_flops(spec, model)
    if machine.gpu is not None:
        return _gpu_seconds(spec, model, machine, flops, passes)
    full = isinstance(spec.adapter, FullSpec)
    if full:
        machine = replace(machine, value_bytes=FP32)  # trained weights are in fp32, and there is no autocast on a CPU
    again = 1 if spec.optim.gradient_checkpointing else 0
    packed = spec.quant.kind == "nf4" and spec.quant.resident != "dequantised"
    unpack_s = (2 + again) * passes * model.linear_params / UNPACK_PER_S if packed else 0.0
    dropout_s = tokens * _dropped(spec, model) / DROPPED_PER_S
    calls_s = passes * model.layers * PASS_BLOCK_S
    trained = trained_params(model, spec.adapter)
    shared = 1 if spec.strategy.kind == "ddp" else spec.num_workers
    adam_s = trained * CPU_ADAM_BYTES / shared / (machine.speed.gbytes_per_s * 1e9)
    one_core_s = machine.core_s(flops, TRAIN_EFFICIENCY) + unpack_s + dropout_s + calls_s + adam_s
    return one_core_s / machine.pace(processes, spec.cpus_per_worker)


def _dropped(spec: TrainSpec, model: ModelShape) -> int:
    """Values of one token that pass the adapters' dropout, in all blocks."""
    if not (isinstance(spec.adapter, LoraSpec) and spec.adapter.dropout):
        return 0
    return sum(linear.count * linear.inputs for linear in model.targets(spec.adapter.targets))


def _gpu_seconds(spec: TrainSpec, model: ModelShape, machine: Machine, flops: float, passes: float) -> float:
    """Products at the GPU's rate, or the start of their kernels where that takes longer; then bytes over bandwidth."""
    assert machine.gpu is not None
    gpu, full = machine.gpu, isinstance(spec.adapter, FullSpec)
    rate = (gpu.tflops if machine.value_bytes == BF16 else gpu.fp32_tflops) * 1e12 * (GPU_FULL if full else GPU_LORA)
    bandwidth = gpu.gbytes_per_s * 1e9 * GPU_MEMORY
    again = 1 if spec.optim.gradient_checkpointing else 0
    launch_s = passes * model.layers * LAUNCH_BLOCK_S * (1 + again / 3)
    unpacked = passes * (2 + again) * model.linear_params * (0.5 + machine.value_bytes)
    trained = trained_params(model, spec.adapter)
    unpack_s = unpacked / bandwidth if spec.quant.kind != "none" else 0.0
    step_s = trained * ADAM_BYTES / bandwidth / (spec.num_workers if spec.strategy.kind != "ddp" else 1)
    return max(flops / rate, launch_s) + unpack_s + step_s + _exchange_seconds(spec, model, trained, passes, gpu)


def _exchange_seconds(spec: TrainSpec, model: ModelShape, trained: int, passes: float, gpu: Gpu) -> float:
    """Gradients summed over the workers once a step; under ZeRO-3 and FSDP2 weights fetched in each pass, twice.

    DDP sums gradients in fp32, DeepSpeed in the 16 bits that it trains in. Where each worker has a share of the
    weights, gradients are sent once to the worker that has them; else the sum is sent back to all.
    """
    share, sharded = (spec.num_workers - 1) / spec.num_workers, spec.strategy.kind in ("zero3", "fsdp2")
    value = BF16 if spec.strategy.kind.startswith("zero") else FP32
    sent = (1 if sharded else 2) * share * trained * value
    if sharded:
        sent += 2 * passes * share * model.params * BF16
    rate = gpu.link_gbytes_per_s if spec.num_workers <= gpu.per_machine else gpu.network_gbytes_per_s
    return sent / (min(rate, gpu.link_gbytes_per_s) * 1e9 * LINK_EFFICIENCY)


def _magnitude_flops(spec: TrainSpec, model: ModelShape) -> float:
    """DoRA's norm of the whole updated weight, once a forward pass (PEFT multiplies A and B by the identity)."""
    if not (isinstance(spec.adapter, LoraSpec) and spec.adapter.dora):
        return 0.0
    times = 2 if spec.optim.gradient_checkpointing else 1
    targets = model.targets(spec.adapter.targets)
    return times * sum(x.count * 2 * spec.adapter.rank * x.inputs * (x.inputs + x.outputs) for x in targets)


def evaluation_seconds(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine, processes: int) -> float:
    """The held-out loss over `rows`, shared among a run's workers: forward passes alone."""
    flops = rows.count * (rows.mean * PADDING * 2 * model.linear_params + rows.mean_trained * 2 * model.head_params)
    if machine.gpu is not None:
        return flops / spec.num_workers / (machine.gpu.tflops * 1e12 * GPU_LORA)
    return machine.core_s(flops / spec.num_workers, TRAIN_EFFICIENCY) / machine.pace(processes, spec.cpus_per_worker)


def outcomes_seconds(spec: TrainSpec, model: ModelShape, work: TokenWork, machine: Machine, processes: int) -> float:
    """Measuring `work` once, shared among a run's workers: continuations weighed, answers written to their most."""
    weighed = (work.read + work.prompts) * 2 * model.linear_params + work.weighed * 2 * model.head_params
    written = work.written * 2 * (model.linear_params + model.head_params)
    steps = work.decoding_steps * model.layers
    if machine.gpu is not None:
        read_s = (
            work.decoding_steps * model.params * machine.value_bytes / (machine.gpu.gbytes_per_s * 1e9 * GPU_MEMORY)
        )
        one_s = weighed / (machine.gpu.tflops * 1e12 * GPU_LORA) + read_s + steps * GPU_DECODE_BLOCK_S
        return one_s / spec.num_workers
    one_s = machine.core_s(weighed, TRAIN_EFFICIENCY) + machine.core_s(written, DECODE_EFFICIENCY)
    return (one_s + steps * DECODE_BLOCK_S) / spec.num_workers / machine.pace(processes, spec.cpus_per_worker)
