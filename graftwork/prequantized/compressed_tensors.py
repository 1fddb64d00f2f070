"""Checkpoints of compressed-tensors (llm-compressor): FP8, int8, and 4 or 8 bits packed into int32 words.

`config_groups.*.weights` gives bits, type, strategy and group size. Formats `float-quantized`, `int-quantized` and
`naive-quantized` store one value a byte in `weight`; `pack-quantized` stores `weight_packed` [O, I * bits / 32], values
plus 2^(bits-1), lowest bits first, and zero points packed along the rows. Reference: compressed-tensors 0.20
(`decompress` of each compressor), which computes (q - zero) * scale in the dtype of the scale.
"""

from math import ceil
from typing import TYPE_CHECKING, Any

from graftwork.prequantized.format import (
    IGNORED,
    PackedFormat,
    Parts,
    Settings,
    names,
    needed,
    unpack_columns,
    unsupported,
)

if TYPE_CHECKING:
    import torch

BYTES = ("float-quantized", "int-quantized", "naive-quantized")
"""Formats with one value a byte."""
PACKED = "pack-quantized"
STRATEGIES = ("tensor", "channel", "group", "block")
SCALE_BYTES = 2
"""Of a scale, in the dtype of the model that was quantised: 16 bits."""


def read(settings: Settings) -> PackedFormat:
    """Return the format of this `quantization_config`. Raises BaseModelError."""
    kind, weights = _scheme(settings)
    bits, strategy = int(weights["num_bits"]), str(weights.get("strategy") or "tensor")
    columns = int(weights.get("group_size") or 0) if strategy == "group" else 0
    block = [int(size) for size in weights.get("block_structure") or ()] if strategy == "block" else []

    def scales(inputs: int, outputs: int) -> int:
        if strategy == "block":
            return ceil(outputs / block[0]) * ceil(inputs / block[1])
        return {"tensor": 1, "channel": outputs}.get(strategy, outputs * ceil(inputs / max(columns, 1)))

    def packed_bytes(inputs: int, outputs: int) -> int:
        zeros = 0.0 if weights.get("symmetric", True) else scales(inputs, outputs) * bits / 8
        return round(ceil(inputs * bits / 32) * 4 * outputs + scales(inputs, outputs) * SCALE_BYTES + zeros)

    def dequantise(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
        return _values(parts, bits, block).to(dtype)

    stored = "float" if weights.get("type") == "float" else "int"
    grain = {"group": f"groups of {columns}", "block": "blocks of " + "x".join(map(str, block))}
    return PackedFormat(
        label=f"compressed-tensors {stored}{bits} ({grain.get(strategy, f'a scale per {strategy}')})",
        parts=(
            "weight_packed",
            "weight_shape",
            "weight_scale",
            "weight_zero_point",
            "weight_g_idx",
            "weight",
            *IGNORED,
        ),
        marks=("weight_packed", "weight_scale"),
        dequantise=dequantise,
        prepare=lambda parts: _prepare(parts, bits),
        packed_bytes=packed_bytes,
        plain=names(settings, "ignore"),
    )


def _scheme(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Return the format and the settings of the weights, which all groups share. Raises BaseModelError."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if group.get("weights")]
    found = [group["weights"] for group in groups]
    if not found or any(_layout(weights) != _layout(found[0]) for weights in found):
        raise unsupported("config_groups", f"{len(found)} groups with different weights", "all groups share one layout")
    kinds = {str(group.get("format") or settings.get("format")) for group in groups}
    weights, kind = found[0], kinds.pop()
    if kinds or kind not in (*BYTES, PACKED):
        raise unsupported("format", repr(kind), f"formats that are read: {', '.join((*BYTES, PACKED))}")
    for key in ("sparsity_config", "transform_config"):
        if (given := settings.get(key)) and given.get("format", "other") != "dense":
            raise unsupported(key, "set", "sparse and rotated weights are not read")
    if (strategy := weights.get("strategy") or "tensor") not in STRATEGIES:
        raise unsupported("config_groups.weights.strategy", repr(strategy), f"strategies: {', '.join(STRATEGIES)}")
    widths = (4, 8) if kind == PACKED else (8,)
    if weights.get("num_bits") not in widths:
        raise unsupported(
            "config_groups.weights.num_bits",
            repr(weights.get("num_bits")),
            f"bits of {kind}: {', '.join(map(str, widths))}",
        )
    return kind, weights


def _layout(weights: dict[str, Any]) -> list[Any]:
    keys = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "actorder")
    return [weights.get(key) for key in keys]


def _prepare(parts: Parts, bits: int) -> Parts:
    """Return the parts without a shape that the words give, and without an index of groups in order (-1)."""
    kept = dict(needed(parts))
    if "weight_shape" in kept and not int(kept["weight_shape"][1]) * bits % 32:
        del kept["weight_shape"]
    if "weight_g_idx" in kept and bool((kept["weight_g_idx"] < 0).any()):
        del kept["weight_g_idx"]
    return kept


def _values(parts: Parts, bits: int, block: list[int]) -> "torch.Tensor":
    """Return (q - zero) * scale in the scale's dtype, [O, I]."""
    import torch

    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    if "weight_packed" in parts:
        outputs, inputs = len(parts["weight_packed"]), parts["weight_packed"].shape[1] * 32 // bits
        if "weight_shape" in parts:
            inputs = int(parts["weight_shape"][1])
        q_OI = unpack_columns(parts["weight_packed"], bits)[:, :inputs] - 2 ** (bits - 1)
        if zero is not None and zero.dtype == torch.int32:
            zero = unpack_columns(zero.t(), bits)[:, :outputs].t() - 2 ** (bits - 1)
    else:
        q_OI = parts["weight"]
        if q_OI.element_size() != 1:
            raise ValueError(f"weight is stored as {q_OI.dtype}: quantization_status is not compressed")
        outputs, inputs = q_OI.shape
    index = parts.get("weight_g_idx")

    def spread(values: "torch.Tensor") -> "torch.Tensor":
        """Each value at the weights that share it, or where it broadcasts to them."""
        if values.numel() == 1:
            return values.reshape(1, 1)
        values = values if values.dim() > 1 else values[:, None]
        if block:
            return values.repeat_interleave(block[0], 0)[:outputs].repeat_interleave(block[1], 1)[:, :inputs]
        if grouped:
            return values.unsqueeze(-1)
        return values[:, index] if index is not None else values

    grouped = not block and index is None and scale.dim() > 1 and scale.shape[1] > 1
    plain: torch.Tensor = q_OI.to(scale.dtype)
    if grouped:
        plain = plain.unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        plain = plain - spread(zero).to(scale.dtype)
    return (plain * spread(scale)).reshape(outputs, inputs)
