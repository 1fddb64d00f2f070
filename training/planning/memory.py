"""Memory model of a training worker: its process on a CPU, its part of the GPU's memory on a GPU.

These formulas alone decide if a run fits and resolve `auto`: 0.03 ms a candidate (4 blocks of Llama-3-8B's shape, 4
rows of 2,048 tokens; median of 200). The traced step of `tests/fake_step.py` takes 1.6 CPU seconds there, is the
oracle of their test, and agrees within 3 % (nf4 with checkpointing 5 %) in 17 settings.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwork.base.load import resolve
from graftwork.base.model_shape import ModelShape
from graftwork.base.source import BaseSpec
from graftwork.planning.hardware import BF16, FP32, MIB
from graftwork.planning.memory import (
    BATCH_TOKENS,
    CUDA_BYTES,
    FRAGMENTS,
    MemoryPlan,
    RowSizes,
    kv_bytes,
    loading_bytes,
    saved_bytes,
    unpacked_layer_bytes,
    weight_bytes,
)
from graftwork.training.loop import step_plan
from graftwork.training.optimizers import state_bytes
from graftwork.training.spec import TrainSpec


def kind_of(spec: TrainSpec) -> str:
    """The kind of a run: `sft lora nf4`."""
    return f"{spec.objective.kind} {spec.adapter.kind} {spec.quant.kind}"


LOGIT_COPIES = 3
"""In fp32: log-softmax, the gradients of it and of its input, alive together in the backward pass of cross-entropy."""
TILE_TOKENS, TILE_VOCAB = 4096, 32_768
"""Largest tile of logits in TRL's fused head (trl/kernels/chunked_logprob.py)."""
TILE_COPIES = 7
"""In fp32, of a tile where the fused head is made of torch's own operations, as on a CPU (`_backward_tile`)."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of one worker."""

    rows: int
    tokens: int
    """Of the longest rows."""
    row: int
    """Tokens of one sequence."""
    masked: bool
    """Rows of one pass differ in length: a mask says where they end."""
    scored: int
    """Positions whose logits are computed."""
    fused_head: bool
    """The head works in tiles and never holds all logits."""
    varied: bool = False
    """Other passes have other shapes."""

    def describe(self) -> str:
        """Return the pass as text."""
        return f"{self.rows} rows of {self.tokens // self.rows} tokens a forward pass, {self.scored} of them scored"


def pass_of(spec: TrainSpec, rows: RowSizes, micro_batch: int) -> Pass:
    """The forward pass of a spec with the most tokens. A pair of preferences is two sequences, a prompt as many as its
    answers."""
    return passes_of(spec, rows, micro_batch)[0]


def passes_of(spec: TrainSpec, rows: RowSizes, micro_batch: int) -> tuple[Pass, ...]:
    """The forward passes that can be the largest, most tokens first: each further one has more scored positions.

    Where the rows are known they are those of the run, as `step_plan` deals the rows and as they are padded.
    """
    traits = spec.objective.traits
    sequences, cuda = traits.sequences, spec.gpus > 0
    fused = cuda or traits.head in ("fused", "fused_trained")
    masked = traits.packing != "none" or (rows.padded and micro_batch * sequences > 1)
    masked = masked and spec.strategy.context_parallel == 1

    if rows.each is None:
        sizes, varied = [(-(-rows.longest // sequences), micro_batch * rows.longest_trained)], rows.padded
    else:
        steps = step_plan(rows.each.lengths_N, spec.optim, spec.seed, spec.replicas, None)
        rows_PM = steps.rows_SR.reshape(-1, micro_batch)
        widths_P, trained_P = rows.each.widths_N[rows_PM].max(axis=1), rows.each.trained_N[rows_PM].sum(axis=1)
        sizes, varied = [], bool(widths_P.min() != widths_P.max())
        for index in np.lexsort((-trained_P, -widths_P)):
            if not sizes or trained_P[index] > sizes[-1][1]:
                sizes.append((int(widths_P[index]), int(trained_P[index])))
    passes, parts = [], spec.strategy.context_parallel
    for row, trained in ((-(-row // parts), trained) for row, trained in sizes):
        tokens = micro_batch * sequences * row
        scored = min(trained, tokens)  # one worker's part may hold all of them
        if traits.head == "reward":
            scored = 0
        elif traits.head == "fused" and not cuda:  # TRL 1.16 scores every position where there is no Triton
            scored = tokens
        passes.append(Pass(micro_batch, tokens, row, masked, scored, fused, varied))
    return tuple(passes)


def logit_bytes(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> int:
    """Peak of the output head, without the activations."""
    if taken.fused_head:
        models = 2 if spec.objective.traits.second_model else 1
        copies = value_bytes if spec.gpus else value_bytes + TILE_COPIES * FP32
        tile = min(taken.scored, TILE_TOKENS) * min(model.vocab, TILE_VOCAB) * copies
        gathered = taken.scored * model.hidden * (value_bytes + FP32)  # the scored positions, their gradient in fp32
        return models * (gathered + tile)
    copies = LOGIT_COPIES * FP32 + (value_bytes if value_bytes == BF16 else 0)
    return taken.scored * model.vocab * copies


def router_loss_bytes(model: ModelShape, taken: Pass) -> int:
    """Bytes of the load-balancing loss: a number for each expert of each place of each token, of all blocks at once.

    transformers 5.24 makes it as int64 and again in fp32, with padding twice (`load_balancing_loss_func`).
    """
    values = taken.tokens * model.expert_blocks * model.experts_per_token * model.num_experts
    return values * (8 + FP32) * (2 if taken.masked else 1) * model.router_loss


def score_bytes(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> int:
    """Peak of the backward pass of one attention beyond the activations, where a block keeps its scores; else 0.

    Gradients of the softmax's result and of its input, a number each for each query, key and head, while what the MLP
    of the block had kept is free again. A softmax in fp32 of 16-bit scores has both in fp32, and no longer its result
    in 16 bits.
    """
    if not model.keeps_scores:
        return 0
    wide, narrow = model.score_bytes
    gradients = 2 * FP32 - BF16 if value_bytes == BF16 and 2 * narrow > wide else 2 * value_bytes
    keys = taken.row + spec.adapter.virtual_tokens
    return round(taken.tokens * (keys * model.heads * gradients - model.mlp_values * value_bytes))


def scoring_bytes(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> int:
    """Peak of a pass without gradients while the pass that trains has kept its activations; 0 where a step has none.

    One block at a time: an adapted MLP has two inner results more than its backward pass; eager attention has its
    scores, masked ones and the softmax, or 16-bit scores next to fp32 ones and their softmax.
    """
    if not spec.objective.traits.scored_per_step:
        return 0
    wide, narrow = model.score_bytes
    scores = (BF16 + 2 * FP32 if value_bytes == BF16 and 2 * narrow > wide else 3 * value_bytes) * model.keeps_scores
    attention = taken.row * model.heads * scores
    mlp = (model.mlp_gradients + 2 * (model.intermediate + model.hidden)) * value_bytes
    return round(taken.tokens * max(attention, mlp))


def auxiliary_bytes(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> dict[str, int]:
    """Bytes next to the trained model, by name: a teacher; the keys and values of answers being sampled."""
    traits = spec.objective.traits
    if (teacher := traits.second_model) is not None:  # on a base of its own in the worker's process
        shape = ModelShape.from_config(_config(teacher.base or spec.base))
        return {"teacher": weight_bytes(shape, teacher.quant or spec.quant, value_bytes)}
    if traits.samples_answers:
        return {"sampling": kv_bytes(model, taken.tokens, value_bytes) + taken.rows * model.vocab * FP32 * 2}
    return {}


@functools.cache
def _config(base: BaseSpec) -> Mapping[str, Any]:
    return resolve(base).config


# ZeRO (arXiv 1910.02054) keeps 1/N of the optimizer (1), of the gradients too (2), of the weights too (3). The figures
# are of DeepSpeed 0.19's settings in `training/strategies`.


BUCKET_VALUES = 50_000_000
"""Values of one reduction or gathering of DeepSpeed: a copy of so many is alive next to gradients and weights."""
LIVE_BLOCKS = 2
"""Blocks whose weights are whole on a worker at once: the one at work and the one that is fetched."""


@dataclass(frozen=True)
class Shared:
    """Bytes of one worker. `host` is in the machine's memory, which on a CPU is the same one."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    buffers: int
    """Buckets of reductions, gathered blocks."""
    host: int = 0


def shared(spec: TrainSpec, model: ModelShape, value_bytes: int) -> Shared:
    """Weights, gradients and optimizer of one worker: frozen weights as they are loaded, trained ones in fp32.

    Under DeepSpeed on a GPU weights that are trained are in bf16, and their fp32 form is part of the optimizer's state.
    """
    trained, plain = spec.adapter.trained_params(model), spec.quant.resident == "dequantised"
    base_bytes = weight_bytes(model, spec.quant, value_bytes, dequantised=plain)
    frozen_bytes = model.outside_params * FP32 if spec.adapter.trains_base else base_bytes
    kind, workers, cuda = spec.strategy.kind, spec.num_workers, spec.gpus > 0
    if kind == "ddp":
        buckets = trained * FP32 if workers > 1 else 0
        return Shared(frozen_bytes, trained * FP32, trained * FP32, state_bytes(spec, model), buckets)
    if kind == "fsdp2":
        gathered = LIVE_BLOCKS * -(-(frozen_bytes + trained * FP32) // (model.layers + 1))
        part = trained * FP32 // workers
        return _offload_shares(spec, Shared(frozen_bytes // workers, part, part, 2 * part, gathered))
    stage, value = int(kind[-1]), BF16 if cuda else FP32
    bucket = min(trained, BUCKET_VALUES) * value
    optimizer = trained * 3 * FP32 // workers  # two moments and the fp32 weights that are stepped
    gradients = trained * value // (workers if stage >= 2 else 1)
    if stage < 3:
        return _offload_shares(spec, Shared(frozen_bytes, trained * value, gradients, optimizer, 2 * bucket))
    live = LIVE_BLOCKS * -(-(frozen_bytes + trained * value) // (model.layers + 1))
    whole = Shared(frozen_bytes // workers, trained * value // workers, gradients, optimizer, bucket + live)
    return _offload_shares(spec, whole)


def _offload_shares(spec: TrainSpec, shared: Shared) -> Shared:
    """With the parts that a strategy moves off a GPU: to the host's memory, or to a disk; on a CPU to a disk alone."""
    cuda, strategy = spec.gpus > 0, spec.strategy
    optimizer, weights, trained, host = shared.optimizer, shared.weights, shared.trained, 0
    if strategy.offload_optimizer == "nvme" or (strategy.offload_optimizer == "cpu" and cuda):
        host += optimizer * (strategy.offload_optimizer == "cpu")
        optimizer = 0
    if strategy.offload_weights == "nvme" or (strategy.offload_weights == "cpu" and cuda):
        host += (weights + trained) * (strategy.offload_weights == "cpu")
        weights = trained = 0
    return Shared(weights, trained, shared.gradients, optimizer, shared.buffers, host)


PROCESS_BYTES = 660 * MIB
"""Peak of a worker that trains a base of 0.2 M parameters: Python 3.11, torch 2.13, transformers, PEFT, TRL,
bitsandbytes and Ray 2.60 on Linux x86-64 (`benchmarks/memory_plan.py`). 160 MiB of it are library pages that processes
share."""
ALLOCATOR_SHARE = 0.15
"""Freed temporaries between live activations that glibc does not return, as a share of activations and logits."""
BETWEEN_STEPS = frozenset(
    {
        "process",
        "base weights",
        "trained weights",
        "optimizer",
        "buffers",
        "loaded whole",
        "unpacked layer",
        "teacher",
        "fragments",
        "CUDA",
    }
)
NEVER_AT_ONCE = "never at once"
"""Name of the part that is taken off again."""


def predict_training(
    spec: TrainSpec, model: ModelShape, rows: RowSizes | None = None, *, value_bytes: int = FP32
) -> MemoryPlan:
    """Peak of one training worker: the end of the forward pass over the longest rows, or the loading if that is more.

    `rows`: sizes of the rendered rows; without them every row is taken as `spec.max_length` long and half trained.
    `value_bytes` is of the compute dtype, as `compute_dtype` picks it. Raises BaseModelError for a base
    whose activations no formula predicts (`ModelShape.unplanned`).
    """
    model.require_planned(f"memory of {spec.name}")
    rows = rows or RowSizes.at_most(spec.max_length)
    if spec.gpus:
        model = model.on_gpu(trains_base=spec.adapter.trains_base)
    predict, outcomes = (_on_gpu if spec.gpus else _on_cpu), spec.outcomes
    plans = [predict(spec, model, taken, value_bytes) for taken in passes_of(spec, rows, micro_batch(spec))]
    step = max(plans, key=lambda plan: plan.peak_bytes)
    if not (outcomes.task or outcomes.retention or outcomes.fairness):
        return step
    # while outcomes are measured: what stays between steps, and a forward pass of which all is scored
    logits = BATCH_TOKENS * model.vocab * (value_bytes + 2 * FP32)  # then in fp32, and their log-softmax
    block = BATCH_TOKENS * (4 * model.hidden + 2 * model.q_size + 2 * model.kv_size + 3 * model.intermediate) * FP32
    stays = tuple((name, size) for name, size in step.parts if name in BETWEEN_STEPS)
    measured = logits + max(block, kv_bytes(model, BATCH_TOKENS, value_bytes))
    measuring = MemoryPlan((*stays, ("outcomes", measured)), step.assumptions, step.host)
    return max(step, measuring, key=lambda plan: plan.peak_bytes)


def _on_cpu(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> MemoryPlan:
    full, workers = spec.adapter.trains_base, spec.num_workers
    if full:
        value_bytes = FP32  # the trained weights are in fp32, and there is no autocast on a CPU
    kept, again = _activations(spec, model, taken, value_bytes)
    activations = kept + again
    logits = max(logit_bytes(spec, model, taken, value_bytes), _passing_bytes(spec, model, taken, value_bytes, again))
    part = shared(spec, model, value_bytes)
    passes = spec.optim.rows_per_step // spec.replicas // taken.rows
    # gradients of embedding and head that a pass adds to those of earlier passes, where all weights are trained: a
    # tied weight gets two of them, one as the head and one as the embedding; those of other layers are small
    added = 2 * model.head_params * FP32 if passes > 1 and full else 0
    # freed memory that glibc does not give back. Where all weights are trained, gradients are freed after each step
    # and come again between the activations of the next: whatever the rows, one fp32 copy of the weights is lost in
    # pieces or filled with activations
    lost = round(ALLOCATOR_SHARE * (activations + logits))
    if full:
        lost = max(lost, model.params * FP32 - activations - logits)
    step = {
        "trained weights": part.trained,
        "gradients": part.gradients + added,
        "optimizer": part.optimizer,
        "buffers": part.buffers,
        # the shares of the others, which FSDP2 loads first and gives back to glibc, which keeps them
        "loaded whole": (workers - 1) * (part.weights + part.trained) if spec.strategy.kind == "fsdp2" else 0,
        "unpacked layer": _unpacked_bytes(spec, model, value_bytes, autocast=False),
        "activations": activations,
        "logits": logits,
        **auxiliary_bytes(spec, model, taken, value_bytes),
        "allocator": lost,
    }
    resident = {"process": PROCESS_BYTES, "base weights": part.weights}
    loading = {} if spec.quant.resident == "dequantised" else loading_bytes(model, spec.quant)
    parts = resident | (step if sum(step.values()) >= sum(loading.values()) else loading)
    notes = (
        taken.describe(),
        *_score_notes(spec, model, value_bytes),
        f"Python, PyTorch and Ray take {PROCESS_BYTES // MIB} MiB a process",
    )
    return MemoryPlan(tuple((name, size) for name, size in parts.items() if size), notes)


def _on_gpu(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> MemoryPlan:
    """Compute in 16 bits is autocast's: fp32 adapters are copied to 16 bits for as long as a pass lasts."""
    autocast, kind = value_bytes == BF16, spec.strategy.kind
    kept, again = _activations(spec, model, taken, value_bytes, autocast=autocast, mask_bytes=1)
    part = shared(spec, model, value_bytes)
    copies = spec.adapter.trained_params(model) * BF16 if autocast and kind in ("ddp", "fsdp2") else 0
    backward = taken.tokens * model.mlp_gradients * value_bytes
    passing = _passing_bytes(spec, model, taken, value_bytes, again)
    logits = max(logit_bytes(spec, model, taken, value_bytes), backward, passing)
    # In the backward pass gradients take the place of activations, where one worker computes one pass a step: gradients
    # of accumulated passes are there while the next keeps its activations, and a strategy's shares are in buffers of
    # their own. On a CPU both count: glibc keeps what it is given back in pieces that the optimizer's first step fills
    # (all weights of SmolLM2-135M: 3.38 GiB measured, 2.77 without the gradients).
    one_pass = spec.optim.rows_per_step // spec.replicas // taken.rows <= 1
    alone = one_pass and kind == "ddp" and spec.num_workers == 1
    parts = {
        "base weights": part.weights,
        "trained weights": part.trained,
        "gradients": part.gradients,
        "optimizer": part.optimizer,
        "buffers": part.buffers,
        "16-bit copies": copies,
        "unpacked layer": _unpacked_bytes(spec, model, value_bytes, autocast=autocast),
        "activations": kept + again,
        "logits and their gradients": logits,
        NEVER_AT_ONCE: -min(part.gradients, kept + logits + copies) if alone else 0,
        **auxiliary_bytes(spec, model, taken, value_bytes),
    }
    parts |= {"fragments": round(FRAGMENTS * sum(parts.values())), "CUDA": CUDA_BYTES}
    host = {"process": PROCESS_BYTES, "offloaded": part.host}
    return MemoryPlan(
        tuple((name, size) for name, size in parts.items() if size),
        (taken.describe(), *_score_notes(spec, model, value_bytes)),
        tuple((name, size) for name, size in host.items() if size),
    )


def _score_notes(spec: TrainSpec, model: ModelShape, value_bytes: int) -> tuple[str, ...]:
    if not model.keeps_scores:
        return ()
    bound = ", at most," if spec.adapter.trains_base and value_bytes == BF16 else ""
    return (f"attention keeps {model.score_bytes[value_bytes == BF16]:g} bytes{bound} for each two tokens and head",)


def _passing_bytes(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int, again: int) -> int:
    """The largest of what is made in passing. again: bytes of a block computed again, of which scoring has none."""
    scores, router = score_bytes(spec, model, taken, value_bytes), router_loss_bytes(model, taken)
    return max(scores, router, scoring_bytes(spec, model, taken, value_bytes) - again)


def allocated(plan: MemoryPlan) -> int:
    """Bytes that torch's allocator gives out at a GPU's peak (`torch.cuda.max_memory_allocated`)."""
    return plan.peak_bytes - plan.part("CUDA") - plan.part("fragments")


def _activations(
    spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int, *, autocast: bool = False, mask_bytes: int = FP32
) -> tuple[int, int]:
    """(saved by the forward pass, one block computed again under checkpointing)."""
    masked = taken.masked or spec.adapter.virtual_tokens or model.keeps_scores
    row = taken.row if masked else None  # where a mask or scores are saved
    block = saved_bytes(model, spec.adapter, row, value_bytes=value_bytes, autocast=autocast, mask_bytes=mask_bytes)
    ends = 2 * model.hidden * value_bytes
    adapted = spec.adapter.saved_weights(model) * value_bytes
    unpacked = spec.quant.is_4bit and spec.quant.resident != "dequantised"  # experts, which a pass keeps unpacked
    weights = max(adapted, model.expert_params * value_bytes if unpacked else 0)
    one, gradient = (size / max(1, model.expert_blocks) for size in (weights, adapted / 3))  # of the smaller parameter
    if not spec.optim.gradient_checkpointing:
        return round(taken.tokens * (block * model.layers + ends) + weights), round(gradient)
    inputs = model.layers * model.hidden * value_bytes
    return round(taken.tokens * (inputs + ends)), round(taken.tokens * block + one + gradient)


def _unpacked_bytes(spec: TrainSpec, model: ModelShape, value_bytes: int, *, autocast: bool) -> int:
    """A quantised layer while it is multiplied; with DoRA an identity of its inputs, or four forms of the weight."""
    plain = not spec.quant.is_packed or spec.quant.resident == "dequantised"
    layer = 0 if plain else unpacked_layer_bytes(model, spec.quant, value_bytes)
    return layer + spec.adapter.weight_scratch_bytes(model, autocast=autocast)


def micro_batch(spec: TrainSpec) -> int:
    """Rows of one forward pass on one worker: the largest divisor of its rows that `optim.micro_batch` allows."""
    per_worker = spec.optim.rows_per_step // spec.replicas
    return max(size for size in range(1, min(spec.optim.rows_per_pass, per_worker) + 1) if per_worker % size == 0)
