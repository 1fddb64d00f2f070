"""Linear layer whose frozen weight stays packed as in its checkpoint, and the hook that loads it by transformers.

Upstream: `register_quantizer`, and `HfQuantizer._process_model_before_weight_loading` and
`_process_model_after_weight_loading`, which a quantizer overrides; checked with transformers 5.24.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftwork.prequantized.convert import PackedFiles
from graftwork.prequantized.format import PackedFormat

NAME = "graftwork-packed"


class PackedLinear(nn.Linear):
    """y = x W^T + b with W [O, I] computed from its parts in each forward and each backward pass, in `dtype`.

    The parts are parameters without a gradient: DDP sends buffers to all ranks in each pass. A gradient goes to the
    input alone.
    """

    def __init__(
        self,
        parts: Mapping[str, torch.Tensor],
        packed: PackedFormat,
        size: tuple[int, int],
        dtype: torch.dtype,
        bias: torch.Tensor | None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a plain weight
        self.in_features, self.out_features = size
        self.packed_format, self.dtype = packed, dtype
        self.part_types = {name: (part.dtype, part.shape) for name, part in parts.items()}
        for name, part in parts.items():
            stored = part.detach().contiguous()
            # bytes: DeepSpeed casts parameters of floating dtypes, and ranks cannot send those of 8 bits
            held = stored.reshape(-1).view(torch.uint8) if stored.is_floating_point() else stored
            self.register_parameter(_attribute(name), nn.Parameter(held, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The exact values [O, I], computed at each use."""
        parts: dict[str, torch.Tensor] = {name: getattr(self, _attribute(name)).data for name in self.part_types}
        for name, (dtype, shape) in self.part_types.items():
            if dtype.is_floating_point:
                parts[name] = parts[name].view(dtype).view(shape)
        with torch.no_grad():
            return self.packed_format.dequantise(parts, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (the name in nn.Linear)
        """Return x W^T + b; [..., I] to [..., O]."""
        if torch.is_grad_enabled() and input.requires_grad:
            out: torch.Tensor = _PackedProduct.apply(input, self)  # type: ignore[no-untyped-call]
            return out
        return linear(input, self.weight, self.bias)


class _PackedProduct(torch.autograd.Function):
    """The product of `PackedLinear`; the plain weight lives during one product, not until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        """Return x W^T + b."""
        ctx.layer = layer
        return linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of x."""
        (grad,) = grads
        return grad @ ctx.layer.weight.to(grad.dtype), None


def _attribute(part: str) -> str:
    return f"packed_{part.lstrip('_')}"


@register_quantization_config(NAME)
class PackedLoadConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """`quantization_config` of a load that keeps weights packed."""

    def __init__(self, files: PackedFiles, packed: PackedFormat, dtype: torch.dtype) -> None:
        self.quant_method = NAME
        self.files, self.packed, self.dtype = files, packed, dtype


def _is_unread(model: Any, module: str) -> bool:
    """Return whether transformers leaves the module's tensors out, as those of layers for multi-token prediction.

    Upstream: `PreTrainedModel._keys_to_ignore_on_load_unexpected`.
    """
    return any(re.search(pattern, f"{module}.weight") for pattern in model._keys_to_ignore_on_load_unexpected or ())


class PackedParts(nn.Module):
    """Tensors of one layer under their names in the checkpoint, while it is loaded."""

    def __init__(self, plain: nn.Linear, parts: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.size = (plain.in_features, plain.out_features)
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", plain.bias)


@register_quantizer(NAME)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces each packed linear: before its tensors are read by their holder, after it by the layer that computes."""

    quantization_config: PackedLoadConfig

    def is_serializable(self) -> bool:
        """Return False: the checkpoint itself is the file of these weights."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = self.quantization_config.files
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if missing := [module for module in files.modules if module not in linears and not _is_unread(model, module)]:
            raise ValueError(f"{missing[0]} is packed in the checkpoint, and is no linear layer of the model")
        for module, parts in ((name, parts) for name, parts in files.modules.items() if name in linears):
            plain = linears[module]
            plain.bias = None if plain.bias is None else nn.Parameter(plain.bias, requires_grad=False)
            model.set_submodule(module, PackedParts(plain, {part: files.shape(name) for part, name in parts.items()}))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        for name, holder in list(model.named_modules()):
            if isinstance(holder, PackedParts):
                parts = {part: tensor.data for part, tensor in holder.named_parameters() if part != "bias"}
                bias = None if holder.bias is None else holder.bias.data
                model.set_submodule(
                    name, PackedLinear(config.packed.prepare(parts), config.packed, holder.size, config.dtype, bias)
                )
        self.remove_quantization_config(model)
