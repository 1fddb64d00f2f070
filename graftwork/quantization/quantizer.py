"""Quantization of the weights of a base by bitsandbytes, and their form in memory."""

import functools
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any, Literal

from graftwork.quantization.methods import LoadOptions
from graftwork.quantization.spec import QuantSpec

if TYPE_CHECKING:
    import torch


def import_bitsandbytes() -> None:
    """Import bitsandbytes (0.50) without a warning and without the compiler; call it before anything else imports it.

    It warns on CPUs with AVX512-BF16 that a hub's kernel is missing, and takes the kernel that it carries itself. And
    it decorates four functions with torch.compile, which loads PyTorch's whole inductor (0.9 CPU s a process). They are
    compiled at their first call here, which never comes on devices with kernels of their own, as CPU and CUDA have.
    """
    import torch

    getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)
    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(functools.partial(compile_now, function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_now


def dequantise_linears(model: "torch.nn.Module") -> None:
    """Replace each packed 4-bit linear by a plain one that holds its exact values."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, packed in list(model.named_modules()):
        if not isinstance(packed, Linear4bit):
            continue
        weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        plain = torch.nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = packed.bias
        model.set_submodule(name, plain)
    config = getattr(model, "config", None)
    if config is not None and hasattr(
        config, "quantization_config"
    ):  # PEFT and save_pretrained must not take it for a quantized model
        del config.quantization_config
    for mark, value in (("is_quantized", False), ("is_loaded_in_4bit", False), ("hf_quantizer", None)):
        if hasattr(model, mark):
            setattr(model, mark, value)


def resident_form(quant: QuantSpec, device: str, purpose: Literal["train", "serve"]) -> tuple[bool, str]:
    """Return whether packed weights are dequantised after loading, and the form of the weights with its reason."""
    name = f"weights={quant.kind if quant.is_packed else 'plain'}"
    if not quant.is_4bit:
        return False, f"{name} ({quant.method.note})" if quant.method.note else name
    if quant.resident != "auto":
        return quant.resident == "dequantised", f"{name} {quant.resident}"
    if device != "cpu":
        return False, f"{name} packed (unpacked by the GPU's kernel)"
    if purpose == "train":
        return False, f"{name} packed (training: an eighth of the memory of fp32)"
    return True, f"{name} dequantised (exact values; on a CPU the packed form is slower from a few rows on)"


def load_config(quant: QuantSpec, dtype: "torch.dtype", storage: "torch.dtype | None" = None) -> Any:
    """Return transformers' quantization config; None for plain weights. Packed weights are bytes, or in `storage`."""
    import_bitsandbytes()
    make = quant.method.config
    return make(LoadOptions(dtype, quant.double_quant, storage)) if make is not None else None
