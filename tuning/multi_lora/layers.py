"""Adapters side by side: of each trial its own weights and optimizer, and of equal ranks one stack to multiply with.

Legend: M trials of one stack, P values of one adapter, R rank, S linears with the same input, I inputs, O outputs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graftwork.adapters.lora import LoraSpec
from graftwork.compat.hf import attention_name
from graftwork.training.lr_schedule import scale as scale_rate
from graftwork.training.lr_schedule import scheduler_of
from graftwork.training.spec import OptimSpec
from graftwork.tuning.multi_lora.group import LONGEST


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
        optimizer = torch.optim.AdamW(
            [weights], lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
        )
        planned = scheduler_of(optim, steps)
        schedule = get_scheduler(planned.name, optimizer, planned.warmup_steps, steps, planned.kwargs)
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


# Attention of short rows on a CPU in bfloat16, where torch's fused kernel is slow.
#
# Forward and backward of 16 rows of 76 tokens, 9 heads of 64, one core (torch 2.13, AMD with AVX512-BF16): fused
# 24.5 ms, products and softmax 11.8; rows of 160 26.0 and 20.4; of 400 41.6 and 56.5. In fp32 both take the same.
#
# Legend: B rows, H query heads, K key heads, T tokens, D head size.


NAME = "graftwork_short_rows"
HARMLESS = {"position_ids", "use_cache", "sliding_window"}
"""Keywords that models pass on and that change nothing; where a window would hide tokens there is a mask."""


def prefer_products(model: Any) -> None:
    """Let a loaded base compute attention so where it is faster; elsewhere as before."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or attention_name(model.config) != "sdpa":
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """In transformers' signature; all but plain causal attention of short rows is left to sdpa."""
    plain = attention_mask is None and not dropout and more.keys() <= HARMLESS and getattr(module, "is_causal", True)
    if not plain or query.shape[2] > LONGEST or not torch.is_grad_enabled():
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return found
    return short_rows(query, key, value, scaling or query.shape[-1] ** -0.5).transpose(1, 2).contiguous(), None


def short_rows(q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention, (B, H, T, D), by products over all query heads of a key head at once; softmax in fp32."""
    rows, heads, tokens, size = q_BHTD.shape
    grouped = (rows, k_BKTD.shape[1], heads // k_BKTD.shape[1] * tokens)
    scores_BHTT = (q_BHTD.reshape(*grouped, size) @ k_BKTD.mT).view(rows, heads, tokens, tokens) * scaling
    later_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHTD.device).triu(1)
    chances = scores_BHTT.masked_fill(later_TT, -torch.inf).softmax(-1, dtype=torch.float32).to(v_BKTD.dtype)
    return (chances.view(*grouped, tokens) @ v_BKTD).view(rows, heads, tokens, v_BKTD.shape[-1])


# The frozen linears with the adapters of all trials on them: forward and backward in few products, nothing copied.
#
# Rows of a batch stand trial by trial: (K * rows, tokens, I). While the adapters are fresh they stand once for all.
# Legend: K trials, M trials of one stack, N positions of one trial, R rank, S linears with the same input, I inputs,
# O outputs.


class StackedLoras:
    """Linears that read the same input, computed together when the first of them is asked."""

    def __init__(self, adapters: Adapters, number: int, bases: list[torch.nn.Module]) -> None:
        self.adapters, self.number, self.bases = adapters, number, bases
        plain = [base for base in bases if type(base) is torch.nn.Linear]
        self.plain = plain if len(plain) == len(bases) else []
        """All or none: gradients go through them here, through other kinds of linear by autograd."""
        self._anchor = torch.zeros((), device=next(bases[0].parameters()).device, requires_grad=True)
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, which: int, x: torch.Tensor) -> torch.Tensor:
        """Of one of them; the others' wait until they are asked with the same input."""
        if x is not self._input or which not in self._waiting:
            given = () if self.plain else tuple(base(x) for base in self.bases)
            outputs = _Added.apply(x, self._anchor, self, *given)  # type: ignore[no-untyped-call]  # torch's own
            self._input, self._waiting = x, dict(enumerate(outputs))
        found = self._waiting.pop(which)
        if not self._waiting:
            self._input = None
        return found

    def parts(self, *tensors: torch.Tensor) -> Iterator[tuple[Stack, list[torch.Tensor]]]:
        """Each stack with its trials' rows of these tensors."""
        for stack in self.adapters.stacks:
            yield stack, [self.rows_of(stack, tensor) for tensor in tensors]

    def rows_of(self, stack: Stack, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a stack's trials, (M, N, ...), a view where `tensor` is contiguous; of fresh ones all rows."""
        copies = self.adapters.copies
        flat = tensor.reshape(copies, -1, tensor.shape[-1])
        return flat.expand(stack.size, -1, -1) if self.adapters.fresh else flat[stack.start : stack.start + stack.size]

    def through_bases(self, gradients: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        """The gradient of the input by way of the frozen weights; zeros where autograd takes that way itself."""
        if not self.plain:
            return torch.zeros_like(x)
        first, *others = (gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients)
        dx = first @ self.plain[0].weight
        for gradient, base in zip(others, self.plain[1:], strict=True):
            dx.addmm_(gradient, base.weight)
        return dx.view_as(x)


class Adapted(torch.nn.Module):
    """Stands in the model for a frozen linear."""

    def __init__(self, siblings: StackedLoras, which: int) -> None:
        super().__init__()
        self.base = siblings.bases[which]
        self.siblings, self.which = siblings, which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.siblings.output(self.which, x)


class _Added(torch.autograd.Function):
    """base(x) + B A x of each trial, for all siblings. Gradients of A and B are added to the stacks' own.

    `given`: the bases' outputs where those are no plain linears, whose products autograd then takes back itself.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, _anchor: torch.Tensor, here: StackedLoras, *given: torch.Tensor) -> Any:
        if given:
            outputs = [output.clone() for output in given]
        else:
            outputs = [torch.nn.functional.linear(x, base.weight, base.bias) for base in here.plain]
        inner = []
        for stack, (x_MNI, *ys) in here.parts(x, *outputs):
            inner.append(x_MNI @ stack.a[here.number].mT)
            if not here.adapters.fresh:
                for y_MNO, h_MNR, b_MOR in zip(ys, _multiply_each(inner[-1], stack), stack.b[here.number], strict=True):
                    y_MNO.baddbmm_(h_MNR, b_MOR.mT)
        ctx.siblings = here
        ctx.save_for_backward(x, *inner)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, *inner = ctx.saved_tensors
        here: StackedLoras = ctx.siblings
        dx = here.through_bases(gradients, x) if ctx.needs_input_grad[0] else None
        for h, (stack, (x_MNI, *dys)) in zip(inner, here.parts(x, *gradients), strict=True):
            for dy_MNO, h_MNR, db_MOR in zip(
                dys, _multiply_each(h, stack), stack.b_gradients[here.number], strict=True
            ):
                db_MOR += dy_MNO.mT @ h_MNR
            if not here.adapters.fresh:  # through a B of zeros nothing comes back
                dhs = [dy_MNO @ b_MOR for dy_MNO, b_MOR in zip(dys, stack.b[here.number], strict=True)]
                dh = torch.cat(dhs, dim=-1) if len(dhs) > 1 else dhs[0]
                stack.a_gradients[here.number].add_(dh.mT @ x_MNI)
                if dx is not None:
                    here.rows_of(stack, dx).baddbmm_(dh, stack.a[here.number])
        return dx, None, None, *(() if here.plain else gradients)


def _multiply_each(h: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, ...]:
    """(M, N, S * R) -> S times (M, N, R)."""
    parts: tuple[torch.Tensor, ...] = h.split(stack.rank, dim=-1)
    return parts
