"""Adapters side by side: of each trial its own weights and optimizer, and of equal ranks one stack to multiply with.

Legend: M trials of one stack, P values of one adapter, R rank, S linears with the same input, I inputs, O outputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from graftwork.training.rates import scale as scale_rate
from graftwork.training.spec import LoraSpec, OptimSpec


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same input: q, k and v; gate and up; or one alone."""

    names: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]


@dataclass
class Trial:
    """One adapter as it is trained. `weights_P`: the A of all places, then the B of all linears, in fp32."""

    key: str
    rank: int
    scale: float
    weights_P: torch.nn.Parameter
    max_grad_norm: float
    optimizer: torch.optim.Optimizer
    schedule: Any

    @classmethod
    def create(cls, key: str, adapter: LoraSpec, optim: OptimSpec, steps: int, weights_P: torch.Tensor) -> "Trial":
        """With the optimizer and the schedule that `graftwork train` gives it (transformers' Trainer)."""
        from transformers import get_scheduler

        weights = torch.nn.Parameter(weights_P)
        optimizer = torch.optim.AdamW([weights], lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
        name = {"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule)
        schedule = get_scheduler(name, optimizer, math.ceil(optim.warmup_ratio * steps), steps)
        if optim.factors:
            scale_rate(optimizer, schedule, optim.factors, steps)
        scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
        return cls(key, adapter.rank, scale, weights, optim.max_grad_norm, optimizer, schedule)

    @property
    def lr(self) -> float:
        """Of the step to come."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> float:
        """Take the optimizer's step on the gradient; its norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_([self.weights_P], self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return float(norm)


class Stack:
    """Trials of one rank: their weights in the compute dtype, B times its scale, and the gradients of those, in fp32.

    One product for all of a stack: with 4 trials of rank 16 half the time of one by one, and no rank is padded.
    """

    def __init__(self, trials: Sequence[Trial], start: int, places: Sequence[LinearGroup], dtype: torch.dtype) -> None:
        self.trials, self.size, self.rank = trials, len(trials), trials[0].rank
        self.start = start
        """Place of its first trial among all."""
        device = trials[0].weights_P.device
        self._a_size = sum(len(place.names) * place.inputs for place in places) * self.rank
        self._scale_M1 = torch.tensor([[trial.scale] for trial in trials], device=device)
        shape = (self.size, trials[0].weights_P.numel())
        self.weights_MP = torch.empty(shape, dtype=dtype, device=device)
        self.gradients_MP = torch.zeros(shape, device=device)
        self.a = cut_a(self.weights_MP, places, self.rank)
        self.b = cut_b(self.weights_MP, places, self.rank)
        self.a_gradients = cut_a(self.gradients_MP, places, self.rank)
        self.b_gradients = cut_b(self.gradients_MP, places, self.rank)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the trials' weights, and forget the gradients."""
        for place, trial in enumerate(self.trials):
            self.weights_MP[place] = trial.weights_P
        self.weights_MP[:, self._a_size :] *= self._scale_M1
        self.gradients_MP.zero_()

    @torch.no_grad()
    def step(self) -> list[float]:
        """One optimizer step of each trial; the norms of their gradients."""
        self.gradients_MP[:, self._a_size :] *= self._scale_M1
        for place, trial in enumerate(self.trials):
            trial.weights_P.grad = self.gradients_MP[place]
        norms = [trial.step() for trial in self.trials]
        self.refresh()
        return norms


class Adapters:
    """All trials that are still in training, ordered by rank: the order of their rows in a batch."""

    def __init__(self, trials: Sequence[Trial], places: Sequence[LinearGroup], dtype: torch.dtype) -> None:
        self._places, self._dtype = places, dtype
        self.trials: list[Trial] = []
        self.stacks: list[Stack] = []
        self.fresh = True
        """Every B is 0: all trials compute the same, so one copy of the rows stands for all."""
        self.keep(trials)

    def keep(self, trials: Sequence[Trial]) -> None:
        """Go on with these alone; their weights and optimizers stay as they are."""
        self.trials = sorted(trials, key=lambda trial: trial.rank)
        self.stacks = []
        for _, run in groupby(self.trials, key=lambda trial: trial.rank):
            start = sum(stack.size for stack in self.stacks)
            self.stacks.append(Stack(list(run), start, self._places, self._dtype))

    @property
    def copies(self) -> int:
        """How often the rows stand in a batch."""
        return 1 if self.fresh else len(self.trials)

    def step(self) -> list[float]:
        """One optimizer step of all; the norms of their gradients, in the trials' order."""
        moved = any(trial.lr > 0 for trial in self.trials)
        norms = [norm for stack in self.stacks for norm in stack.step()]
        self.fresh = self.fresh and not moved
        return norms


def cut_a(values_MP: torch.Tensor, places: Sequence[LinearGroup], rank: int) -> list[torch.Tensor]:
    """The A of each place, (M, S * R, I): those of its linears one below the other."""
    sizes = [(len(place.names) * rank, place.inputs) for place in places]
    return _cut(values_MP, 0, sizes)


def cut_b(values_MP: torch.Tensor, places: Sequence[LinearGroup], rank: int) -> list[tuple[torch.Tensor, ...]]:
    """The B of each linear of each place, (M, O, R)."""
    start = sum(len(place.names) * place.inputs for place in places) * rank
    flat = iter(_cut(values_MP, start, [(outputs, rank) for place in places for outputs in place.outputs]))
    return [tuple(next(flat) for _ in place.names) for place in places]


def _cut(values_MP: torch.Tensor, start: int, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    found = []
    for rows, columns in sizes:
        end = start + rows * columns
        found.append(values_MP[:, start:end].view(len(values_MP), rows, columns))
        start = end
    return found
