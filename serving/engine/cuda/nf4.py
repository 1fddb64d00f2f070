"""4-bit linears of the base while decoding: the fused kernel for few tokens, bitsandbytes' own forward for all else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from graftwork.serving.engine.cuda.kernels.nf4 import PackedWeight, multiply

MOST_ROWS = 64
"""Above it, unpacking the weight once is cheaper than doing so in every tile of tokens."""

Forward = Callable[..., torch.Tensor]


class DecodeLinears:
    """Gives each packed linear a forward with two ways; `decoding` opens the fused one.

    Prompts stay on bitsandbytes' path, so that their logits are those of peft bit for bit.
    """

    def __init__(self) -> None:
        self._on = False

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it, packed linears use the kernel for up to MOST_ROWS tokens."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def forward_of(self, module: torch.nn.Module) -> Forward:
        """The forward that the engine's hook calls; the module's own where it is no 4-bit linear."""
        own: Forward = module.forward
        if not _is_packed(module):
            return own
        state: list[PackedWeight] = []

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not self._on or x.numel() > MOST_ROWS * x.shape[-1] or args or kwargs:
                return own(x, *args, **kwargs)
            if not state:
                state.append(packed_weight(module.weight))
            return _multiply(x, state[0], module)

        return forward


def packed_weight(parameter: Any) -> PackedWeight:
    """The tensors of a bitsandbytes `Params4bit`, not copied."""
    quant = parameter.quant_state
    outputs, inputs = quant.shape
    nested = quant.state2
    outer = (nested.code, nested.absmax, nested.blocksize, quant.offset) if quant.nested else ()
    codes = parameter.data.view(torch.uint8).reshape(-1)
    return PackedWeight(outputs, inputs, codes, quant.code.float(), quant.absmax, quant.blocksize, *outer)


def _multiply(x: torch.Tensor, weight: PackedWeight, module: Any) -> torch.Tensor:
    """As `Linear4bit.forward`: computed in its compute dtype, returned in x's."""
    dtype = module.compute_dtype or x.dtype
    x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
    return multiply(x_NI, weight, module.bias).to(x.dtype).view(*x.shape[:-1], weight.outputs)


def _is_packed(module: Any) -> bool:
    """A quantised Linear4bit whose lines hold whole blocks of 64, 128, ... weights (fp4 too: the book is data).

    One packed from another 16-bit dtype than it computes in would be rounded twice; it is left to bitsandbytes.
    """
    quant = getattr(getattr(module, "weight", None), "quant_state", None)
    if quant is None or not hasattr(quant, "quant_type"):
        return False
    once = quant.dtype in (torch.float32, module.compute_dtype or quant.dtype)
    return once and quant.blocksize % 64 == 0 and quant.shape[1] % quant.blocksize == 0
