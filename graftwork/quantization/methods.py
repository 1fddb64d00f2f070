"""Table of the quantization methods: storage, loading, and what can train and serve with each.

A new method is one entry of `METHODS` and one value of `QuantKind` (docs/extending.md adds one). Other modules read the
properties of the entry (`quant.method`, `quant.is_packed`, `quant.is_4bit`) and never compare the name of a method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

QuantKind = Literal["none", "int8", "nf4"]
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
    """Of a packed weight, without its scales; 0: weights stay plain."""
    packed_bytes: Callable[[int, int, bool], float] = lambda weights, rows, double: 0
    """Bytes of linears with these weights and output rows, scales included; the third: `double_quant`."""
    config: Callable[[LoadOptions], Any] | None = None
    """transformers' quantization config; None loads plain weights."""
    note: str = ""
    """Of the packed weights in memory, for the reason that a load reports."""
    shards_in_fsdp2: bool = False
    training_advice: str = ""
    """Warning of a training plan."""
    vllm_problem: str = "vLLM's bitsandbytes quantises a base at the start to nf4 alone"
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
        vllm_problem="vLLM quantises to bitsandbytes' int8 no base that is not so on disk",
    ),
    "nf4": four_bit("nf4", vllm_problem=""),
}
FOUR_BIT = tuple(kind for kind, method in METHODS.items() if method.bits == 4)
