"""Hook into transformers' loader that reads a packed checkpoint's tensors into `PackedLinear` layers.

Upstream: `register_quantizer`, and `HfQuantizer._process_model_before_weight_loading` and
`_process_model_after_weight_loading`, which a quantizer overrides; checked with transformers 5.24.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftwork.prequantized.convert import PackedFiles
from graftwork.prequantized.format import PackedFormat
from graftwork.prequantized.linear import PackedLinear

NAME = "graftwork-packed"


@register_quantization_config(NAME)
class PackedLoadConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """`quantization_config` of a load that keeps weights packed."""

    def __init__(self, files: PackedFiles, packed: PackedFormat, dtype: torch.dtype) -> None:
        self.quant_method = NAME
        self.files, self.packed, self.dtype = files, packed, dtype


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
        if missing := [module for module in files.modules if module not in linears]:
            raise ValueError(f"{missing[0]} is packed in the checkpoint, and is no linear layer of the model")
        for module, parts in files.modules.items():
            plain = linears[module]
            plain.bias = None if plain.bias is None else nn.Parameter(plain.bias, requires_grad=False)
            model.set_submodule(module, PackedParts(plain, {part: files.shape(name) for part, name in parts.items()}))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        for name, holder in list(model.named_modules()):
            if isinstance(holder, PackedParts):
                parts = {part: tensor.data for part, tensor in holder.named_parameters() if part != "bias"}
                bias = None if holder.bias is None else holder.bias.data
                model.set_submodule(name, PackedLinear(parts, config.packed, holder.size, config.dtype, bias))
        self.remove_quantization_config(model)
