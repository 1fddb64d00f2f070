"""What one forward pass of each kind of finetuning computes: its tokens, its output head, what stands beside it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwork import base_model
from graftwork.base_model import BaseSpec
from graftwork.memory.sizes import BF16, FP32, EachRow, RowSizes
from graftwork.memory.weights import kv_bytes, weight_bytes
from graftwork.model_shape import ModelShape
from graftwork.step_plan import step_plan
from graftwork.training.objective_spec import DistillSpec, DpoSpec, RewardSpec, RlSpec, TeacherSpec
from graftwork.training.spec import TrainSpec

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
    sequences = 2 if isinstance(spec.objective, DpoSpec | RewardSpec) else 1
    if isinstance(spec.objective, RlSpec):
        sequences = spec.objective.generations
    cuda = spec.gpus > 0
    taught = teacher_of(spec) is not None
    fused = cuda or taught or isinstance(spec.objective, DpoSpec)
    packed = getattr(spec.objective, "packing", "none") != "none"
    masked = packed or (rows.padded and micro_batch * sequences > 1)

    def taken(row: int, trained: int, varied: bool) -> Pass:
        tokens, scored = micro_batch * sequences * row, trained
        if isinstance(spec.objective, RewardSpec):
            scored = 0
        elif fused and not cuda and not taught:  # TRL 1.16 scores every position where there is no Triton
            scored = tokens
        return Pass(micro_batch, tokens, row, masked, scored, fused, varied)

    if rows.each is None:
        longest = -(-rows.longest // sequences)
        return (taken(longest, micro_batch * rows.longest_trained, rows.padded),)
    sizes = _largest(spec, rows.each, micro_batch)
    return tuple(taken(row, trained, sizes.varied) for row, trained in sizes.passes)


@dataclass(frozen=True)
class _Largest:
    passes: tuple[tuple[int, int], ...]
    """(tokens of a row with its padding, trained tokens of all rows)."""
    varied: bool


def _largest(spec: TrainSpec, each: EachRow, micro_batch: int) -> _Largest:
    steps = step_plan(each.lengths_N, spec.optim, spec.seed, spec.num_workers, None)
    rows_PM = steps.rows_SR.reshape(-1, micro_batch)
    widths_P, trained_P = each.widths_N[rows_PM].max(axis=1), each.trained_N[rows_PM].sum(axis=1)
    found: list[tuple[int, int]] = []
    for index in np.lexsort((-trained_P, -widths_P)):
        if not found or trained_P[index] > found[-1][1]:
            found.append((int(widths_P[index]), int(trained_P[index])))
    return _Largest(tuple(found), bool(widths_P.min() != widths_P.max()))


def logit_bytes(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> int:
    """The output head at its peak, beside the activations."""
    if taken.fused_head:
        models = 2 if teacher_of(spec) else 1
        copies = value_bytes if spec.gpus else value_bytes + TILE_COPIES * FP32
        tile = min(taken.scored, TILE_TOKENS) * min(model.vocab, TILE_VOCAB) * copies
        gathered = taken.scored * model.hidden * (value_bytes + FP32)  # the scored positions, their gradient in fp32
        return models * (gathered + tile)
    copies = LOGIT_COPIES * FP32 + (value_bytes if value_bytes == BF16 else 0)
    return taken.scored * model.vocab * copies


def beside_bytes(spec: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> dict[str, int]:
    """What a kind keeps beside the trained model, by name: a teacher; the keys and values of answers being sampled."""
    if (teacher := teacher_of(spec)) is not None:
        return _teacher(teacher, spec, value_bytes)
    if isinstance(spec.objective, RlSpec):
        return {"sampling": kv_bytes(model, taken.tokens, value_bytes) + taken.rows * model.vocab * FP32 * 2}
    return {}


def teacher_of(spec: TrainSpec) -> TeacherSpec | None:
    """Who stands beside the student in each step; nobody where the teacher's texts are learned."""
    objective = spec.objective
    return objective.teacher if isinstance(objective, DistillSpec) and objective.generate is None else None


def _teacher(teacher: TeacherSpec, spec: TrainSpec, value_bytes: int) -> dict[str, int]:
    """The weights of the teacher, which stands on a base of its own in the worker's process."""
    shape = ModelShape.from_config(_config(teacher.base or spec.base))
    return {"teacher": weight_bytes(shape, teacher.quant or spec.quant, value_bytes)}


@functools.cache
def _config(base: BaseSpec) -> Mapping[str, Any]:
    return base_model.resolve(base).config
