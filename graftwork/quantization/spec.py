"""Spec of the precision of a base, and the compute types that follow from it and from the hardware."""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from graftwork import environment
from graftwork.config import Spec
from graftwork.errors import BaseModelError
from graftwork.quantization.methods import FOUR_BIT, METHODS, SMALLEST, QuantKind, QuantMethod

if TYPE_CHECKING:
    import torch


class QuantSpec(Spec):
    """Precision of the frozen base weights. In YAML a plain string is its `kind`."""

    kind: QuantKind = SMALLEST
    """nf4: 4-bit NormalFloat of QLoRA (arXiv 2305.14314) by bitsandbytes."""
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
        """Whether the linear layers are quantised."""
        return self.method.bits > 0

    @property
    def is_4bit(self) -> bool:
        """Whether `double_quant` and `resident` apply."""
        return self.method.bits == 4


Precision = Literal["fp32", "bf16", "int8", "nf4", "nf4-double"]
"""nf4-double: nf4 whose scales are quantised too."""

PRECISIONS: dict[Precision, QuantSpec] = {
    "fp32": QuantSpec(kind="none", dtype="float32"),
    "bf16": QuantSpec(kind="none", dtype="bfloat16"),
    "int8": QuantSpec(kind="int8"),
    "nf4": QuantSpec(kind="nf4"),
    "nf4-double": QuantSpec(kind="nf4", double_quant=True),
}
"""`quant:` of each precision that `graftwork quantize` measures."""


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
    return cpu_dtype(environment.flags(), environment.vendor())


def cpu_dtype(flags: frozenset[str], vendor: str) -> "tuple[torch.dtype, str]":
    """The faster dtype of a CPU with these instruction sets, measured (docs/log.md), and why."""
    import torch

    name, reason = _cpu_dtype_name(flags, vendor)
    return getattr(torch, name), reason


def cpu_value_bytes(quant: QuantSpec) -> int:
    """Bytes of a value in the dtype of compute on this CPU, as `compute_dtype` decides; without torch, for plans."""
    name = _cpu_dtype_name(environment.flags(), environment.vendor())[0] if quant.dtype == "auto" else quant.dtype
    return {"float32": 4, "bfloat16": 2, "float16": 2}[name]


def _cpu_dtype_name(flags: frozenset[str], vendor: str) -> tuple[str, str]:
    if "amx_bf16" in flags:
        return "bfloat16", "CPU with AMX-BF16"
    if "avx512_bf16" in flags and vendor == "AuthenticAMD":
        return "bfloat16", "AMD CPU with AVX512-BF16"
    return "float32", "a CPU without AMX-BF16 (or AMD's AVX512-BF16), where bfloat16 is 1.2 to 8 times slower"
