"""Precision of a base: its spec, the quantization methods, the compute dtype, and bitsandbytes' weights.

A new method is one entry of `METHODS` and one value of `QuantKind` (docs/extending.md adds one). Other modules read the
properties of the entry (`quant.method`, `quant.is_packed`, `quant.is_4bit`) and never compare the name of a method.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import model_validator

from graftwork.config import Spec
from graftwork.environment import cpu_facts, flags
from graftwork.errors import BaseModelError

if TYPE_CHECKING:
    import torch

QuantKind = Literal["none", "int8", "nf4", "checkpoint"]
SMALLEST: QuantKind = "nf4"
"""Method of the least memory: the default, and what a plan suggests where memory is short."""

BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4-bit formats."""
SCALE_BLOCK = 256
"""Scales that share one fp32 scale of their own under double quantisation."""
FP32 = 4


class LoadOptions(NamedTuple):
    """Settings of one load that a method's configuration depends on."""

    dtype: "torch.dtype"
    """Of compute."""
    double_quant: bool
    storage: "torch.dtype | None"
    """Of the packed bytes: None for uint8, else a dtype that FSDP2 can shard."""


@dataclass(frozen=True)
class QuantMethod:
    """One method. Defaults are the careful answer for a method that was not tried."""

    bits: int
    """Of a packed weight, without its scales, at most; 0: weights stay plain."""
    packed_bytes: Callable[[int, int, bool], float] = lambda weights, rows, double: 0
    """Bytes of linears with these weights and output rows, scales included; the third: `double_quant`."""
    config: Callable[[LoadOptions], Any] | None = None
    """transformers' quantization config; None loads plain weights."""
    note: str = ""
    """Of the packed weights in memory, for the reason that a load reports."""
    keeps_checkpoint: bool = False
    """A quantised checkpoint's weights stay as they are; other methods get them dequantised."""
    shards_in_fsdp2: bool = False
    training_advice: str = ""
    """Warning of a training plan."""
    vllm_problem: str = "vLLM's in-flight bitsandbytes quantization supports only nf4"
    """Reason why vLLM does not serve it; empty where it does."""


def _eight_bit_config(options: LoadOptions) -> Any:
    from transformers import BitsAndBytesConfig

    from graftwork.compat.hf import quiet_int8_casts

    quiet_int8_casts()
    # threshold 0: no outlier columns, so a row's result does not depend on other rows of its batch (6.0: 8e-3 apart)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def _four_bit_bytes(weights: int, rows: int, double: bool) -> float:
    """Return half a byte a weight and one fp32 scale per 64 (QLoRA, arXiv 2305.14314).

    With double quantisation the scale is one byte and shares an fp32 scale with 255 others: 0.5159 bytes a weight, as
    counted on bitsandbytes 0.50.
    """
    scale = (1 + FP32 / SCALE_BLOCK) if double else FP32
    return weights * (0.5 + scale / BLOCK)


def four_bit(name: Literal["nf4", "fp4"], *, vllm_problem: str = QuantMethod.vllm_problem) -> QuantMethod:
    """Return the method of one of bitsandbytes' 4-bit formats."""

    def config(options: LoadOptions) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name,
            bnb_4bit_compute_dtype=options.dtype,
            bnb_4bit_use_double_quant=options.double_quant,
            bnb_4bit_quant_storage=options.storage,
        )

    return QuantMethod(
        bits=4,
        packed_bytes=_four_bit_bytes,
        config=config,
        shards_in_fsdp2=True,
        vllm_problem=vllm_problem,
    )


METHODS: dict[QuantKind, QuantMethod] = {
    "none": QuantMethod(bits=0, shards_in_fsdp2=True, vllm_problem=""),
    "int8": QuantMethod(
        bits=8,
        packed_bytes=lambda weights, rows, double: weights + rows * FP32,
        config=_eight_bit_config,
        note="inputs are rounded to fp16",
        training_advice="trains slower than none and nf4 and needs more memory than nf4: take one of them",
        vllm_problem="vLLM loads bitsandbytes int8 only from a checkpoint that is already int8",
    ),
    "nf4": four_bit("nf4", vllm_problem=""),
    "checkpoint": QuantMethod(
        bits=8,
        keeps_checkpoint=True,
        note="packed as in the checkpoint; each pass computes their exact values",
        vllm_problem="vLLM computes a quantised checkpoint with kernels that round activations",
    ),
}
FOUR_BIT = tuple(kind for kind, method in METHODS.items() if method.bits == 4)


class QuantSpec(Spec):
    """Precision of the frozen base weights. In YAML a plain string is its `kind`."""

    kind: QuantKind = SMALLEST
    """nf4: 4-bit NormalFloat of QLoRA (arXiv 2305.14314) by bitsandbytes. checkpoint: a quantised base stays as its
    checkpoint packs it; with the others it is dequantised first."""
    double_quant: bool = False
    """Quantize the scales of a 4-bit method too: 0.4 bit a weight less, a little slower."""
    resident: Literal["auto", "packed", "dequantised"] = "auto"
    """Form of 4-bit weights in memory: packed, or their exact values as plain weights (bit-equal output, faster on most
    CPUs)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of compute, and of weights that are not quantised; auto: bfloat16 where the hardware has instructions for it."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if not self.is_4bit:
            for key in ("double_quant", "resident"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    owners = ", ".join(FOUR_BIT)
                    raise ValueError(f"{key} cannot take effect with kind={self.kind!r}: it belongs to {owners}")
        return self

    @property
    def method(self) -> QuantMethod:
        """Storage, loading and limits of the kind."""
        return METHODS[self.kind]

    @property
    def is_packed(self) -> bool:
        """Return whether the linear layers are quantised."""
        return self.method.bits > 0

    @property
    def is_4bit(self) -> bool:
        """Return whether `double_quant` and `resident` apply."""
        return self.method.bits == 4


Precision = Literal["fp32", "bf16", "int8", "nf4", "nf4-double", "checkpoint"]
"""nf4-double: nf4 whose scales are quantised too."""

PRECISIONS: dict[Precision, QuantSpec] = {
    "fp32": QuantSpec(kind="none", dtype="float32"),
    "bf16": QuantSpec(kind="none", dtype="bfloat16"),
    "int8": QuantSpec(kind="int8"),
    "nf4": QuantSpec(kind="nf4"),
    "nf4-double": QuantSpec(kind="nf4", double_quant=True),
    "checkpoint": QuantSpec(kind="checkpoint"),
}
"""`quant:` of each precision that `graftwork quantize` measures."""
OF_ALL_BASES: tuple[Precision, ...] = tuple(
    name for name, quant in PRECISIONS.items() if not quant.method.keeps_checkpoint
)
"""Precisions of a base whose checkpoint is not quantised."""


def compute_dtype(quant: QuantSpec, device: str) -> "tuple[torch.dtype, str]":
    """The dtype of compute on `device`, and why. Raises BaseModelError for one that the device has no units for."""
    import torch

    found, reason = default_dtype(device)
    if quant.dtype == "auto":
        return found, reason
    dtype: torch.dtype = getattr(torch, quant.dtype)
    if dtype == torch.bfloat16 and found != dtype and device != "cpu":
        raise BaseModelError("quant.dtype=bfloat16", reason, "bfloat16 needs SM 8.0 or newer", "set quant.dtype=auto")
    return dtype, "asked for" if dtype == found else f"asked for; auto is {str(found).removeprefix('torch.')}"


def default_dtype(device: str) -> "tuple[torch.dtype, str]":
    """The dtype of compute on `device`, and why."""
    import torch

    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"SM {major}.{minor}"
        return torch.float32, f"SM {major}.{minor} has no bfloat16"
    name, reason = cpu_dtype_name(flags(), cpu_facts().get("vendor_id", ""))
    return getattr(torch, name), reason


def cpu_value_bytes(quant: QuantSpec) -> int:
    """Bytes of a value in the dtype of compute on this CPU, as `compute_dtype` decides; without torch, for plans."""
    name = quant.dtype
    if name == "auto":
        name, _ = cpu_dtype_name(flags(), cpu_facts().get("vendor_id", ""))
    return {"float32": 4, "bfloat16": 2}[name]


def cpu_dtype_name(flags: frozenset[str], vendor: str) -> tuple[Literal["float32", "bfloat16"], str]:
    """The faster dtype of a CPU with these instruction sets, measured (docs/log.md), and why."""
    if "amx_bf16" in flags:
        return "bfloat16", "CPU with AMX-BF16"
    if "avx512_bf16" in flags and vendor == "AuthenticAMD":
        return "bfloat16", "AMD CPU with AVX512-BF16"
    return "float32", "a CPU without AMX-BF16 (or AMD's AVX512-BF16), where bfloat16 is 1.2 to 8 times slower"


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
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):  # PEFT and save_pretrained must not take it for a quantized model
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
    config = quant.method.config
    return config(LoadOptions(dtype, quant.double_quant, storage)) if config is not None else None
