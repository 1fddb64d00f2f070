"""The base as the readers of adapters see it: names and shapes of its linears, and weights where a kind needs them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from graftwork.adapters.experts import expert_weights, router_weights
from graftwork.compat.hf import unpack_cpu_layout
from graftwork.serving.engine.adapters.format import LinearShape
from graftwork.serving.engine.kv_cache import KvShape


class BaseView:
    """Reads only: loading threads use it while the model runs.

    linears: those that can take an adapter. kv_shapes: of each layer.
    """

    def __init__(self, model: Any, linears: Mapping[str, LinearShape], kv_shapes: Sequence[KvShape] = ()) -> None:
        self.linears, self.kv_shapes = linears, tuple(kv_shapes)
        self.experts = {one.name: one for one in expert_weights(model)}
        self.routers = {name.removesuffix(".weight") for name in router_weights(model)} - set(linears)
        self._modules: dict[str, torch.nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.embedding: Any = model.get_input_embeddings()
        self.output: Any = model.get_output_embeddings()
        self.embedding_name = self._name_of(self.embedding)
        self.output_name = self._name_of(self.output)
        self.vocab_size, self.hidden_size = (int(size) for size in self.embedding.weight.shape)

    @property
    def tied(self) -> bool:
        """True: the output layer's weight is the embedding itself."""
        return self.output is not None and self.output.weight is self.embedding.weight

    @property
    def embedding_scale(self) -> torch.Tensor | None:
        """Factor of the embedding layer's rows (Gemma 3), as peft reads it."""
        scale = getattr(self.embedding, "embed_scale", None)
        return torch.as_tensor(scale) if scale is not None else None

    def modules_ending(self, name: str) -> list[str]:
        """Full names of the modules that peft's modules_to_save would mean by `name`."""
        return [full for full in self._modules if full.endswith(name)]

    def weight(self, name: str) -> torch.Tensor:
        """The weight of a linear as it multiplies, fp32, [out, in]: dequantised where it is packed."""
        return linear_weight(self._modules[name])

    def bias(self, name: str) -> torch.Tensor | None:
        """The bias of a linear, on the CPU."""
        bias = self._modules[name].bias
        return bias.detach().cpu() if isinstance(bias, torch.Tensor) else None

    def _name_of(self, module: torch.nn.Module | None) -> str:
        return next((name for name, one in self._modules.items() if one is module), "") if module is not None else ""


def linear_weight(module: torch.nn.Module) -> torch.Tensor:
    """Weight of a linear, of bitsandbytes' ones or of a Conv1D, fp32, [out, in]. Changes nothing in it."""
    weight: Any = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _unpacked_4bit(weight)
    plain: torch.Tensor
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        state: Any = module.state
        rows_OI = weight.data if state.CB is None else state.CB
        scale_O = weight.SCB if state.SCB is None else state.SCB
        plain = int8_vectorwise_dequant(rows_OI, scale_O.to(rows_OI.device))
    else:
        plain = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
    return plain.float()


def _unpacked_4bit(weight: Any) -> torch.Tensor:
    """bitsandbytes' own values, also where it has repacked them for its AVX512-BF16 kernel (absmax is bf16 then)."""
    from bitsandbytes import functional

    data, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        absmax_NB, state.original_nested = state.absmax, False
        data, state = unpack_cpu_layout(data, state)
        state.absmax, state.dtype = absmax_NB.t().reshape(-1).float(), torch.float32
    unpacked: torch.Tensor = functional.dequantize_4bit(data, state)
    return unpacked.float()
