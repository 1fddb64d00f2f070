"""Rows of each step, worker and forward pass. Pure functions of lengths and seed, so any step can be redone.

Legend: S steps, R rows a step (all workers), W workers, G forward passes a step on one worker, M rows a pass,
N rows of the set.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graftwork.training.spec import OptimSpec


@dataclass(frozen=True)
class StepPlan:
    """The rows of every step. A step sees the same rows whatever the number of workers."""

    rows_SR: NDArray[np.int64]
    tokens_S: NDArray[np.int64]
    """Tokens of each step, padding left out."""
    micro_batch: int
    """Rows of a forward pass: the largest divisor of a worker's rows a step that `optim.micro_batch` allows."""
    accumulation: int
    """Forward passes of one worker a step."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.rows_SR)


def step_plan(
    lengths_N: NDArray[np.int64], optim: OptimSpec, seed: int, world: int, max_steps: int | None, repeats: int = 1
) -> StepPlan:
    """Order of the rows: one seeded permutation a pass, laid end to end, cut into steps of `rows_per_step`.

    The last step is filled up from the next pass. Within a step rows are sorted by length, so that rows of one forward
    pass need little padding, and dealt to the workers back and forth, so that their loads are near equal.
    repeats: steps in a row on the same rows (`objective.iterations`); a pass takes so many times the steps.
    """
    rows, per_worker = optim.rows_per_step, optim.rows_per_step // world
    micro = max(d for d in range(1, min(optim.rows_per_pass, per_worker) + 1) if per_worker % d == 0)
    steps = max_steps or max(1, math.ceil(optim.epochs * len(lengths_N) / rows - 1e-9)) * repeats
    fresh = math.ceil(steps / repeats)
    passes = math.ceil(fresh * rows / len(lengths_N))
    order = np.concatenate([np.random.default_rng([seed, p]).permutation(len(lengths_N)) for p in range(passes)])
    rows_SR = _dealt(order[: fresh * rows].reshape(fresh, rows), lengths_N, world, micro)
    rows_SR = rows_SR.repeat(repeats, axis=0)[:steps]
    return StepPlan(rows_SR, lengths_N[rows_SR].sum(axis=1), micro, per_worker // micro)


def _dealt(rows_SR: NDArray[np.int64], lengths_N: NDArray[np.int64], world: int, micro: int) -> NDArray[np.int64]:
    """Rows of steps in the order that the data loader deals them: pass 0 of worker 0, of worker 1, ..., pass 1 ..."""
    by_length = np.take_along_axis(rows_SR, np.argsort(lengths_N[rows_SR], axis=1, kind="stable"), axis=1)
    passes_SGWM = by_length.reshape(len(rows_SR), -1, world, micro)
    passes_SGWM[:, 1::2] = passes_SGWM[:, 1::2, ::-1].copy()
    return passes_SGWM.reshape(rows_SR.shape)
