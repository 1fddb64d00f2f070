"""AWQ checkpoints (arXiv 2306.00978) in AutoAWQ's `gemm` layout: 4 bits with a zero point and an fp16 scale a group.

`qweight` [I, O / 8] holds eight outputs of one input in an int32 word, in the order 0 2 4 6 1 3 5 7 from the lowest
bits on; `qzeros` [G, O / 8] likewise; `scales` [G, O]. Reference: AutoAWQ 0.2.9 (`dequantize_gemm`), which computes
(q - zero) * scale in fp16.
"""

from typing import TYPE_CHECKING

from graftwork.prequantized.format import (
    PackedFormat,
    Parts,
    Settings,
    grain,
    group_count,
    names,
    unpack_columns,
    unsupported,
)

if TYPE_CHECKING:
    import torch

BITS = 4
SCALE_BYTES = 2


def read(settings: Settings) -> PackedFormat:
    """Return the format of this `quantization_config`. Raises BaseModelError."""
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if bits != BITS:
        raise unsupported("bits", repr(bits), "AWQ weights have 4 bits")
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise unsupported("version", repr(version), "AWQ weights are read in the layout gemm")
    if settings.get("zero_point", True) is not True:
        raise unsupported("zero_point", repr(settings["zero_point"]), "AWQ weights are read with zero points")
    columns = int(settings.get("group_size", settings.get("q_group_size", 128)))

    def packed_bytes(inputs: int, outputs: int) -> int:
        groups = group_count(inputs, columns)
        return inputs * outputs // 2 + groups * outputs * SCALE_BYTES + groups * outputs // 2

    return PackedFormat(
        label=f"AWQ int4 ({grain(columns)})",
        parts=("qweight", "qzeros", "scales"),
        marks=("qweight",),
        dequantise=dequantise,
        packed_bytes=packed_bytes,
        plain=(*names(settings, "modules_to_not_convert"), "lm_head"),
    )


def dequantise(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
    """Return (q - zero) * scale in the scale's dtype, transposed to [O, I], then in `dtype`."""
    q_IO, zero_GO, scale_GO = _ordered(parts["qweight"]), _ordered(parts["qzeros"]), parts["scales"]
    q_GnO: torch.Tensor = q_IO.unflatten(0, (scale_GO.shape[0], -1))
    plain_IO = ((q_GnO - zero_GO[:, None]) * scale_GO[:, None]).flatten(0, 1)
    return plain_IO.t().contiguous().to(dtype)


def _ordered(words: "torch.Tensor") -> "torch.Tensor":
    """Return the values of words [N, O / 8] in the order of the outputs: [N, O]."""
    pairs_N24: torch.Tensor = unpack_columns(words, BITS).unflatten(
        1, (-1, 2, 4)
    )  # a word holds outputs 0 2 4 6 1 3 5 7
    return pairs_N24.transpose(2, 3).flatten(1)
