"""The frozen linears with the adapters of all trials on them: forward and backward in few products, nothing copied.

Rows of a batch stand trial by trial: (K * rows, tokens, I). While the adapters are fresh they stand once for all.
Legend: K trials, M trials of one stack, N positions of one trial, R rank, S linears with the same input, I inputs,
O outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch

from graftwork.tuning.together.adapters import Adapters, Stack


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
                for y_MNO, h_MNR, b_MOR in zip(ys, _each(inner[-1], stack), stack.b[here.number], strict=True):
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
            for dy_MNO, h_MNR, db_MOR in zip(dys, _each(h, stack), stack.b_gradients[here.number], strict=True):
                db_MOR += dy_MNO.mT @ h_MNR
            if not here.adapters.fresh:  # through a B of zeros nothing comes back
                dhs = [dy_MNO @ b_MOR for dy_MNO, b_MOR in zip(dys, stack.b[here.number], strict=True)]
                dh = torch.cat(dhs, dim=-1) if len(dhs) > 1 else dhs[0]
                stack.a_gradients[here.number].add_(dh.mT @ x_MNI)
                if dx is not None:
                    here.rows_of(stack, dx).baddbmm_(dh, stack.a[here.number])
        return dx, None, None, *(() if here.plain else gradients)


def _each(h: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, ...]:
    """(M, N, S * R) -> S times (M, N, R)."""
    parts: tuple[torch.Tensor, ...] = h.split(stack.rank, dim=-1)
    return parts
