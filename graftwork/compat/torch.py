"""Hooks into PyTorch: tensors without memory, every operation's results, a schedule's present rates.

Checked with torch 2.13. Imports torch: the core imports this module inside functions alone.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a block in which new tensors have shapes, dtypes and storages of a size, but no memory and no values.

    Tensors of the meta device, the public form, do not act as those of the CPU. Tensors from outside may take part.
    Upstream: `torch._subclasses.fake_tensor.FakeTensorMode`.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class EachResult(TorchDispatchMode):
    """Block in which a function is called with each tensor that any operation returns, forward and backward.

    Upstream: `torch.utils._python_dispatch.TorchDispatchMode.__torch_dispatch__(func, types, args, kwargs)` and
    `torch.utils._pytree.tree_iter`.
    """

    def __init__(self, take: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.take = take

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then hand on its tensors."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.take(tensor)
        return out


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that all Python objects of one storage share while it is alive; the next storage may reuse it.

    A fake tensor's storage has no `data_ptr`. Upstream: `UntypedStorage._cdata`, the address of the C++ object.
    """
    return int(storage._cdata)


def set_last_rates(scheduler: Any, rates: Sequence[float]) -> None:
    """Make a learning rate scheduler report these rates as its present ones (`get_last_lr`), until its next step.

    A schedule whose lambdas change after a resume reports the checkpoint's rate for the first step otherwise.
    Upstream: `torch.optim.lr_scheduler.LRScheduler._last_lr`.
    """
    scheduler._last_lr = list(rates)
