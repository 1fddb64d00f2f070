"""Quantization of the weights of a base by bitsandbytes, and the resident form of NF4 weights."""

import functools
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any, Literal

from graftwork.compat.hf import quiet_int8_casts
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


def _resident_form(quant: QuantSpec, device: str, purpose: Literal["train", "serve"]) -> tuple[bool, str]:
    """(whether nf4 is unpacked, how the weights lie in memory and why)."""
    if quant.kind == "int8":
        return False, "weights=int8 (inputs are rounded to fp16)"
    if quant.kind == "none":
        return False, "weights=plain"
    if quant.resident != "auto":
        return quant.resident == "dequantised", f"weights=nf4 {quant.resident}"
    if device != "cpu":
        return False, "weights=nf4 packed (unpacked by the GPU's kernel)"
    if purpose == "train":
        return False, "weights=nf4 packed (training: an eighth of the memory of fp32)"
    return True, "weights=nf4 dequantised (exact values; on a CPU the packed form is slower from a few rows on)"


def _quantiser(quant: QuantSpec, dtype: "torch.dtype", words: "torch.dtype | None" = None) -> Any:
    """What transformers is told of quantising; None for plain weights. nf4 lies in bytes, or in `words`."""
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if quant.kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_quant_storage=words,
        )
    if quant.kind == "int8":
        quiet_int8_casts()
        # threshold 0: no outlier columns, so a row's result does not depend on the rows beside it (6.0: 8e-3 apart)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None
