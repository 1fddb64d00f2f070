"""Plan of a training run: seconds of a step by a roofline model, memory, automatic values, suggested changes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from graftwork.base.model_shape import ModelShape
from graftwork.errors import ConfigError
from graftwork.planning.hardware import BF16, FP32, GIB, Correction, Machine
from graftwork.planning.memory import (
    HEADROOM,
    START_S,
    MemoryPlan,
    RowSizes,
    StagePlan,
    TokenWork,
    charge_bytes,
    fits,
    of_room,
    unpacked_params,
    verdict_of,
)
from graftwork.quantization import SMALLEST
from graftwork.training.optimizers import CPU_STEP_S, STEP_BYTES, muon_flops
from graftwork.training.planning.memory import kind_of, micro_batch, predict_training
from graftwork.training.spec import TrainSpec


def worker_memory(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine) -> MemoryPlan:
    """Peak of one training worker, raised by what earlier runs of its kind have shown on this machine.

    The one prediction of a run: `plan`, `auto`, a run's output and its report all show it.
    """
    plan = predict_training(spec, model, rows, value_bytes=machine.value_bytes)
    correction = machine.peaks.get(kind_of(spec), Correction())
    added = round(plan.peak_bytes * (correction.ratio - 1))
    return replace(plan, parts=(*plan.parts, (correction.part_name(), added))) if added > 0 else plan


TRAIN_EFFICIENCY = 0.70
"""Of the probe's rate, in a training step: smaller products, element-wise work, autograd."""
UNPACK_PER_S = 1.0e9
"""nf4 weights that one core unpacks a second (bitsandbytes 0.50, AVX2)."""
KEPT_UNPACK_PER_S = 40e6
"""Weights of a kept checkpoint that one core dequantises a second: 19 to 60 by format, FP8 and int8 more."""
DROPPED_PER_S = 38e6
"""Values that pass the adapters' dropout in one core's second: PyTorch draws them one by one on a CPU."""
PASS_BLOCK_S = 2e-3
"""One block of one forward and backward pass without its products, in a core's second: Python, autograd."""
RAY_TRAIN_START_S = 10.0
"""Until Ray Train's controller has called the workers: 7 to 9 s on 2 cores."""
RAY_TUNE_START_S = 4.0
"""Until Ray Tune has started its first trials."""
PADDING = 1.04
"""Padded over real tokens: rows of a step are sorted by length."""

GPU_LORA, GPU_FULL = 0.34, 0.50
"""Of a GPU's dense rate. On one H100 (8B, 2,048 tokens): LoRA 0.33 with and 0.35 without checkpointing, QLoRA 0.37; all
weights of 1.2B 0.50 (`docs/log.md`)."""
SCORE_READS = 16, 20
"""Times that a value of a matrix of scores is read or written by eager attention, forward and backward: counted in the
code of Gemma-2; gpt-oss has 13 and 16."""
GPU_MEMORY = 0.75
"""Of a GPU's memory bandwidth, in element-wise work and unpacking."""
LAUNCH_BLOCK_S = 4.5e-3
"""A block's forward and backward pass takes no less: Python starts its kernels one by one (1.5 ms forward)."""
CLIP_BYTES = 12
"""Read and written of one trained value on a CPU, in the norm of the gradients and their clipping."""
DECODE_BLOCK_S, GPU_DECODE_BLOCK_S = 4e-3, 5e-4
"""One block of one step of transformers' generate without its products, with an adapter: Python, the cache."""
DECODE_EFFICIENCY = 0.26
"""Of the probe's rate, in products of few rows."""
LINK_EFFICIENCY = 0.63
"""Of a link's rate in one direction, in collectives (20 GB/s over PCIe 4 x16); nothing overlaps with the computing."""


def step_seconds(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine, processes: int) -> float:
    """One optimizer step of one worker while `processes` such processes run."""
    per_worker, full = spec.optim.rows_per_step / spec.num_workers, spec.adapter.trains_base
    model = model.on_gpu() if machine.gpu is not None else model
    scored = spec.objective.traits.scored_per_step
    again = _more_passes(spec)
    passes = spec.optim.rows_per_step // spec.replicas / micro_batch(spec)
    trained = spec.adapter.trained_params(model)
    tokens = per_worker * rows.mean * (PADDING if rows.padded else 1.0)
    # attention: 4 forward; backward 10, as it computes the scores again
    attention = model.layers * (14 + 4 * again) * (rows.mean + spec.adapter.virtual_tokens) * model.q_size
    weights = (6 if full else 4) + 2 * again
    added = 0 if full else (6 + 2 * scored) * spec.adapter.token_params(model)
    head = ((6 if full else 4) + 2 * scored) * model.head_params
    flops = tokens * (weights * model.active_linear_params + added + attention) + per_worker * rows.mean_trained * head
    flops += passes * (1 + again) * spec.adapter.weight_flops(model)
    if machine.gpu is not None:
        compute_s = _gpu_seconds(spec, model, machine, flops, passes)
        scores_s = _score_bytes(spec, model, rows, machine) / (machine.gpu.gbytes_per_s * 1e9 * GPU_MEMORY)
        return compute_s + scores_s + _exchange_seconds(spec, model, machine, tokens)
    if full:
        machine = replace(machine, value_bytes=FP32)  # trained weights are in fp32, and there is no autocast on a CPU
    unpacked = unpacked_params(model, spec.quant) if spec.quant.is_4bit and spec.quant.resident != "dequantised" else 0
    rate = UNPACK_PER_S
    if spec.quant.method.keeps_checkpoint:
        unpacked, rate = model.packed_params, KEPT_UNPACK_PER_S
    unpack_s = (2 + again) * passes * unpacked / rate
    dropout_s = tokens * spec.adapter.dropped_inputs(model) / DROPPED_PER_S
    calls_s = passes * model.layers * PASS_BLOCK_S * (1 + scored / 3)
    shared = 1 if spec.strategy.kind == "ddp" else spec.num_workers
    memory = machine.speed.gbytes_per_s * 1e9
    value_s = CPU_STEP_S.get(spec.optim.kind, STEP_BYTES[spec.optim.kind] / memory) + CLIP_BYTES / memory
    bf16 = machine.speed.bf16_gflops or machine.speed.gflops
    optimizer_s = trained * value_s / shared + muon_flops(spec, model) / (bf16 * 1e9)
    scores_s = _score_bytes(spec, model, rows, machine) / memory
    one_core_s = machine.core_s(flops, TRAIN_EFFICIENCY) + unpack_s + dropout_s + calls_s + optimizer_s + scores_s
    return one_core_s / machine.pace(processes, spec.cpus_per_worker)


def _more_passes(spec: TrainSpec) -> int:
    """Forward passes of a step next to the one that trains: computed again, and scored without gradients."""
    return int(bool(spec.optim.gradient_checkpointing)) + spec.objective.traits.scored_per_step


def _score_bytes(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine) -> float:
    """Bytes of matrices of scores that one worker reads and writes in a step; 0 where attention keeps none."""
    forward, backward = SCORE_READS
    times = forward * (1 + _more_passes(spec)) + backward
    return spec.optim.rows_per_step / spec.num_workers * times * _row_score_bytes(spec, model, rows, machine)


def _row_score_bytes(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine) -> float:
    """Bytes of the matrices of scores of one row, of all blocks; 0 where attention keeps none."""
    scores = model.layers * model.heads * rows.mean * (rows.mean + spec.adapter.virtual_tokens)
    return scores * machine.value_bytes * model.keeps_scores


def _gpu_seconds(spec: TrainSpec, model: ModelShape, machine: Machine, flops: float, passes: float) -> float:
    """Products at the GPU's rate, or the start of their kernels where that takes longer; then bytes over bandwidth."""
    assert machine.gpu is not None
    gpu, kind, workers = machine.gpu, spec.strategy.kind, spec.num_workers
    efficiency = GPU_FULL if spec.adapter.trains_base else GPU_LORA
    rate = (gpu.tflops if machine.value_bytes == BF16 else gpu.fp32_tflops) * 1e12 * efficiency
    bandwidth = gpu.gbytes_per_s * 1e9 * GPU_MEMORY
    again = _more_passes(spec)
    launch_s = passes * model.layers * LAUNCH_BLOCK_S * (1 + again / 3)
    unpacked = passes * (2 + again) * unpacked_params(model, spec.quant) * (0.5 + machine.value_bytes)
    trained = spec.adapter.trained_params(model)
    unpack_s = unpacked / bandwidth if spec.quant.is_packed else 0.0
    step_s = trained * STEP_BYTES[spec.optim.kind] / bandwidth / (workers if kind != "ddp" else 1)
    step_s += muon_flops(spec, model) / rate
    # Gradients are summed over the workers once a step, in fp32 by DDP, by DeepSpeed in the 16 bits that it trains in;
    # the sum is sent back to all. Where each worker has a share of the weights, gradients are sent once to the worker
    # that has them, and weights are fetched in each pass, twice.
    share, sharded = (workers - 1) / workers, kind in ("zero3", "fsdp2")
    sent = (1 if sharded else 2) * share * trained * (BF16 if kind.startswith("zero") else FP32)
    if sharded:
        sent += 2 * passes * share * model.params * BF16
    link = gpu.link_gbytes_per_s if workers <= gpu.per_machine else gpu.network_gbytes_per_s
    exchange_s = sent / (min(link, gpu.link_gbytes_per_s) * 1e9 * LINK_EFFICIENCY)
    return max(flops / rate, launch_s) + unpack_s + step_s + exchange_s


def _exchange_seconds(spec: TrainSpec, model: ModelShape, machine: Machine, tokens: float) -> float:
    """All-to-all of queries, keys, values and outputs under context parallelism, forward and backward."""
    size = spec.strategy.context_parallel
    assert machine.gpu is not None, "on a CPU the workers share the memory"
    sent = tokens * model.layers * 2 * (2 * model.q_size + 2 * model.kv_size) * machine.value_bytes * (size - 1) / size
    link = machine.gpu.link_gbytes_per_s if size <= machine.gpu.per_machine else machine.gpu.network_gbytes_per_s
    return sent / (link * 1e9 * LINK_EFFICIENCY)


def evaluation_seconds(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine, processes: int) -> float:
    """The held-out loss over `rows`, shared among a run's workers: forward passes alone."""
    model = model.on_gpu() if machine.gpu is not None else model
    attention = 4 * model.layers * (rows.mean + spec.adapter.virtual_tokens) * model.q_size
    each = rows.mean * PADDING * (2 * model.active_linear_params + attention)
    flops = rows.count * (each + rows.mean_trained * 2 * model.head_params)
    moved = rows.count * SCORE_READS[0] * _row_score_bytes(spec, model, rows, machine) / spec.num_workers
    if machine.gpu is not None:
        scores_s = moved / (machine.gpu.gbytes_per_s * 1e9 * GPU_MEMORY)
        return flops / spec.num_workers / (machine.gpu.tflops * 1e12 * GPU_LORA) + scores_s
    one_core_s = machine.core_s(flops / spec.num_workers, TRAIN_EFFICIENCY) + moved / (machine.speed.gbytes_per_s * 1e9)
    return one_core_s / machine.pace(processes, spec.cpus_per_worker)


def outcomes_seconds(spec: TrainSpec, model: ModelShape, work: TokenWork, machine: Machine, processes: int) -> float:
    """Measuring `work` once, shared among a run's workers: continuations weighed, answers written to their most."""
    weighed = (work.read + work.prompts) * 2 * model.active_linear_params + work.weighed * 2 * model.head_params
    written = work.written * 2 * (model.active_linear_params + model.head_params)
    steps = work.decoding_steps * model.layers
    if machine.gpu is not None:
        read_s = (
            work.decoding_steps * model.params * machine.value_bytes / (machine.gpu.gbytes_per_s * 1e9 * GPU_MEMORY)
        )
        one_s = weighed / (machine.gpu.tflops * 1e12 * GPU_LORA) + read_s + steps * GPU_DECODE_BLOCK_S
        return one_s / spec.num_workers
    one_s = machine.core_s(weighed, TRAIN_EFFICIENCY) + machine.core_s(written, DECODE_EFFICIENCY)
    return (one_s + steps * DECODE_BLOCK_S) / spec.num_workers / machine.pace(processes, spec.cpus_per_worker)


# `auto` in a training spec: the fastest setting that is predicted to fit, found before any worker starts.


EQUALLY_FAST = 1.01
"""Of settings within this ratio the one with the least memory is taken."""


@dataclass(frozen=True)
class AutoResult:
    """A spec without `auto`, and the reasons."""

    spec: TrainSpec
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    spec: TrainSpec
    bytes: int
    step_s: float


def has_auto(spec: TrainSpec) -> bool:
    """Return whether the plan has something to decide."""
    return "auto" in (spec.optim.micro_batch, spec.optim.gradient_checkpointing) or _form_is_open(spec)


def _form_is_open(spec: TrainSpec) -> bool:
    """Return whether the plan chooses the form of 4-bit weights: on a CPU unpacking takes a third of a pass."""
    return spec.quant.is_4bit and spec.quant.resident == "auto" and not spec.gpus


def resolve_auto(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine) -> AutoResult:
    """Replace `auto` in `optim` and `quant.resident`.

    Raises ConfigError where nothing fits, with the cheapest change that would.
    """
    if not has_auto(spec):
        return AutoResult(spec)
    if model.unplanned and "auto" not in (spec.optim.micro_batch, spec.optim.gradient_checkpointing):
        return AutoResult(
            spec.with_({"quant.resident": "packed"}), (f"{spec.quant.kind} stays packed: {model.unplanned}",)
        )
    found = []
    for one in _candidates(spec):
        peak = worker_memory(one, model, rows, machine).peak_bytes
        step_s = step_seconds(one, model, rows, machine, one.num_workers)
        found.append(_Candidate(one, charge_bytes(peak, one.num_workers, machine), step_s))
    fitting = [one for one in found if fits(one.bytes, machine)]
    if not fitting and "auto" not in (spec.optim.micro_batch, spec.optim.gradient_checkpointing):
        return AutoResult(spec)  # it was asked for as it is; `plan` says that it may not fit
    if not fitting:
        raise _fit_error(spec, min(found, key=lambda one: one.bytes), model, rows, machine)
    fastest = min(one.step_s for one in fitting)
    best = min((one for one in fitting if one.step_s <= EQUALLY_FAST * fastest), key=lambda one: one.bytes)
    notes, predicted = [], f"predicted {of_room(best.bytes, machine)}"
    if spec.optim.micro_batch == "auto":
        size = micro_batch(best.spec)
        passes = best.spec.optim.rows_per_step // best.spec.replicas // size
        notes.append(f"micro_batch={size}, accumulation={passes} (the fastest that fits: {predicted})")
    if spec.optim.gradient_checkpointing == "auto":
        notes.append(
            f"gradient_checkpointing={'on' if best.spec.optim.gradient_checkpointing else 'off'} ({predicted})"
        )
    if _form_is_open(spec) and best.spec.quant.resident == "dequantised":
        notes.append(f"{spec.quant.kind} is stored as its plain values (no unpacking in each pass: {predicted})")
    return AutoResult(best.spec, tuple(notes))


def _candidates(spec: TrainSpec) -> Iterator[TrainSpec]:
    per_worker = spec.optim.rows_per_step // spec.replicas
    sizes = [n for n in range(1, per_worker + 1) if per_worker % n == 0]
    if spec.optim.micro_batch != "auto":
        sizes = [spec.optim.micro_batch]
    twice: list[bool | str] = [spec.optim.gradient_checkpointing]
    if twice == ["auto"]:  # PEFT's prefix is cached keys and values, which checkpointing drops
        twice = [False] if spec.adapter.virtual_tokens else [False, True]
    for again in twice:
        for size in sizes:
            for form in ("packed", "dequantised") if _form_is_open(spec) else (spec.quant.resident,):
                keys = {"optim.micro_batch": size, "optim.gradient_checkpointing": again, "quant.resident": form}
                yield spec.with_(keys)


def _fit_error(spec: TrainSpec, least: _Candidate, model: ModelShape, rows: RowSizes, machine: Machine) -> ConfigError:
    ways = (way for way, size in suggest_training_changes(least.spec, model, rows, machine) if fits(size, machine))
    way = next(ways, None)
    return ConfigError(
        f"{spec.name}: optim.micro_batch={spec.optim.micro_batch}, "
        f"optim.gradient_checkpointing={spec.optim.gradient_checkpointing}",
        f"the least that it can take is {of_room(least.bytes, machine)} (base of {model.params / 1e9:.1f}B weights)",
        f"a run may take {HEADROOM:.0%} of the memory: {HEADROOM * machine.memory_bytes / GIB:.1f} GiB",
        " ".join(f"--set {one}" for one in way.split()) if way and "(" not in way else way or "take a smaller base",
    )


def plan_training(
    spec: TrainSpec,
    model: ModelShape,
    rows: RowSizes,
    held_out: RowSizes | None,
    machine: Machine,
    outcomes: TokenWork | None = None,
    *,
    on_cluster: bool = False,
) -> StagePlan:
    """A run of `train`. `rows` and `held_out`: sizes of the rendered rows. `outcomes`: measured before and after.

    `on_cluster`: Ray Train starts a single worker too, which is a child process elsewhere (`training.local_worker`).
    Raises ConfigError as `resolve_auto` does.
    """
    settled = resolve_auto(spec, model, rows, machine)
    spec, workers = settled.spec, settled.spec.num_workers
    steps = max(1, math.ceil(spec.optim.epochs * rows.count / spec.optim.rows_per_step - 1e-9))
    evals = math.ceil(steps / spec.eval_every)
    traits = spec.objective.traits
    before_s = traits.scored_before * evaluation_seconds(spec, model, rows, machine, workers)
    eval_s = 0.0
    if held_out:
        once_s = evaluation_seconds(spec, model, held_out, machine, workers)
        eval_s, before_s = (1 + traits.scored_per_step) * once_s, before_s + traits.scored_before * once_s
    start_s = START_S / machine.pace(workers, 1) + (RAY_TRAIN_START_S if on_cluster or workers > 1 else 0.0)
    memory = worker_memory(spec, model, rows, machine)
    peak = memory.peak_bytes
    step_s = step_seconds(spec, model, rows, machine, workers)
    outcomes_s = 2 * outcomes_seconds(spec, model, outcomes, machine, workers) if outcomes else 0.0
    host = (f"{memory.host_bytes / GIB:.1f} GiB of the machine's own memory a worker",) if memory.host else ()
    if outcomes_s and outcomes:
        host = (f"outcomes take {outcomes_s:.0f} s: {outcomes.describe()}, before and after", *host)
    warnings = []
    if spec.quant.method.training_advice:
        warnings.append(f"quant.kind={spec.quant.kind} {spec.quant.method.training_advice}")
    if machine.gpu is not None and not machine.gpu.has_bf16:
        gpu = machine.gpu
        warnings.append(f"{gpu.name} (SM {gpu.sm}) has no bfloat16: computes in float32, twice the memory")
    return StagePlan(
        stage=f"train {spec.name}",
        processes=workers,
        peak_bytes_per_process=peak,
        total_bytes=peak * workers,
        seconds=start_s + before_s + steps * step_s + evals * eval_s + outcomes_s,
        verdict=verdict_of(
            charge_bytes(peak, workers, machine), machine, suggest_training_changes(spec, model, rows, machine)
        ),
        parts=memory.parts,
        assumptions=(
            f"{steps} steps of {spec.optim.rows_per_step} rows",
            *settled.notes,
            *memory.assumptions,
            *host,
            machine.describe(),
        ),
        step_s=step_s,
        warnings=tuple(warnings),
        host_bytes_per_process=memory.host_bytes,
    )


MOST_WORKERS = 64
Change = dict[str, Any]


def suggest_training_changes(
    spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine
) -> Iterator[tuple[str, int]]:
    """(a setting, bytes of the machine's memory that it takes). A change that the spec refuses is left out."""
    for change in _changes(spec, machine):
        try:
            changed = spec.with_(change)
            peak = worker_memory(changed, model, rows, machine.at(changed.quant)).peak_bytes
        except ConfigError:
            continue
        options = []
        for key, value in change.items():
            nested = {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
            options += [f"{name}={str(one).lower() if one is True else one}" for name, one in nested.items()]
        yield " ".join(options), charge_bytes(peak, changed.num_workers, machine)
    for share in (0.75, 0.5, 0.25):
        length, shorter = rows.without_longer(share)
        peak = worker_memory(spec, model, shorter, machine).peak_bytes
        yield f"max_length={length} (longer rows are dropped)", charge_bytes(peak, spec.num_workers, machine)


def _changes(spec: TrainSpec, machine: Machine) -> Iterator[Change]:
    """Smaller passes cost little time, computing twice a third, sharing its messages; then what is trained changes."""
    size = micro_batch(spec)
    while size > 1:
        size //= 2
        yield {"optim.micro_batch": size}
    least: Change = {"optim.micro_batch": 1} if micro_batch(spec) > 1 else {}
    if not spec.optim.gradient_checkpointing and not spec.adapter.virtual_tokens:
        yield {"optim.gradient_checkpointing": True}
        least |= {"optim.gradient_checkpointing": True}
        yield least
    yield from ({**least, **change} for change in _strategy_changes(spec, machine))
    if spec.adapter.trains_base:
        yield {**least, "adapter": {"kind": "lora"}}
        yield {**least, "adapter": {"kind": "lora"}, "quant": {"kind": SMALLEST}}
    elif not spec.quant.is_4bit:
        yield {**least, "quant": {"kind": SMALLEST}}
    yield from ({**least, **change} for change in _worker_changes(spec, machine))


def _strategy_changes(spec: TrainSpec, machine: Machine) -> Iterator[Change]:
    """Other strategies for the workers that there are."""
    kinds = ("zero1", "zero2", "zero3")
    if spec.quant.is_packed or (spec.num_workers == 1 and machine.gpu is None):
        return
    now = spec.strategy.kind
    later = kinds[kinds.index(now) + 1 :] if now in kinds else kinds
    if spec.num_workers > 1:
        yield from ({"strategy": {"kind": kind}} for kind in later)
    if machine.gpu is not None:
        yield {"strategy": {"kind": "zero2", "offload_optimizer": "cpu"}}
        yield {"strategy": {"kind": "zero3", "offload_optimizer": "cpu", "offload_weights": "cpu"}}


def _worker_changes(spec: TrainSpec, machine: Machine) -> Iterator[Change]:
    """Fewer workers where they share one memory; more, with a share of the weights each, where each has a GPU."""
    rows = spec.optim.rows_per_step
    if machine.gpu is None:
        yield from ({"num_workers": n} for n in range(spec.num_workers - 1, 0, -1) if rows % n == 0)
    elif not spec.quant.is_packed:
        more = (n for n in (2, 4, 8, 16, 32, MOST_WORKERS) if n > spec.num_workers and rows % n == 0)
        yield from ({"num_workers": n, "strategy": {"kind": "zero3"}} for n in more)
