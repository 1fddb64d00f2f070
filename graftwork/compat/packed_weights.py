"""Frozen weights that are packed: linear layers that stay as in their checkpoint, experts in 4 bits, and their loading.

Upstream: `register_quantizer`, and `HfQuantizer._process_model_before_weight_loading` and
`_process_model_after_weight_loading`, which a quantizer overrides; checked with transformers 5.24, bitsandbytes 0.50.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftwork.adapters.experts import expert_weights
from graftwork.compat.hf import adapt_packed_parameters
from graftwork.prequantized.convert import PackedFiles
from graftwork.prequantized.format import PackedFormat
from graftwork.quantization import BLOCK, SCALE_BLOCK

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


class FourBitQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' quantizer of bitsandbytes in 4 bits that packs experts too, each as soon as it is read.

    The experts of a base are most of it: packed after loading, all of them would be in memory at once.
    """

    states: dict[str, Any]
    """How a parameter of experts is packed (bitsandbytes' `QuantState`), by its name."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        self.states = {} if self.pre_quantized else dict.fromkeys((one.name for one in expert_weights(model)), None)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether the parameter is one of experts, or of a linear layer that is packed."""
        return param_name in self.states or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        """Return the step that packs one parameter."""
        return _FourBitQuantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

        for name, state in self.states.items():
            if state is None:
                continue  # the checkpoint has no such parameter, which `base.load` refuses
            module, _, key = name.rpartition(".")
            owner = model.get_submodule(module)
            device = getattr(owner, key).device
            replace_parameter_4bit_prequantized(owner, key, state.as_dict(packed=True), device)
        if self.states:
            adapt_packed_parameters()
        return super()._process_model_after_weight_loading(model, **kwargs)


class _FourBitQuantize(Bnb4bitQuantize):  # type: ignore[misc]
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return the parameters packed; `input_dict` has one name, or the names that one tensor is split into.

        One of another shape than the model's stays plain: transformers 5.24 refuses the wrong shapes of those alone.
        """
        settings, packed = self.hf_quantizer.quantization_config, {}
        for name in [name for name in input_dict if name in self.hf_quantizer.states]:
            value = input_dict.pop(name)
            value = value[0] if isinstance(value, list) else value
            if value.shape != kwargs["model"].get_parameter(name).shape:
                del self.hf_quantizer.states[name]
                packed[name] = value
                continue
            packed[name], self.hf_quantizer.states[name] = _pack_experts(
                value, settings.bnb_4bit_quant_type, double=settings.bnb_4bit_use_double_quant
            )
        return {**packed, **super().convert(input_dict, **kwargs)}


def _pack_experts(values_EOI: torch.Tensor, kind: str, *, double: bool) -> tuple[torch.Tensor, Any]:
    """Return the bytes of `quantize_4bit` of the whole and their state, computed expert by expert.

    On a CPU bitsandbytes needs ten times the memory of the 16-bit values that it packs at a time.
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    if values_EOI[0].numel() % BLOCK:
        packed, state = quantize_4bit(values_EOI, quant_type=kind, compress_statistics=double)
        return packed, state
    found = [quantize_4bit(expert.contiguous(), quant_type=kind) for expert in values_EOI]
    state = found[0][1]
    state.shape, state.absmax = values_EOI.shape, torch.cat([one.absmax for _, one in found])
    if double:
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=SCALE_BLOCK)
    return torch.cat([packed for packed, _ in found]), state


def pack_experts_at_load() -> None:
    """Let `from_pretrained` pack experts in 4 bits while it reads them."""
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = FourBitQuantizer
