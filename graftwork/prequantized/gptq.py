"""GPTQ checkpoints (arXiv 2210.17323) of AutoGPTQ and GPTQModel: 2, 4 or 8 bits with a zero point and a scale a group.

`qweight` [I * bits / 32, O] holds consecutive inputs of one output in an int32 word, lowest bits first; `qzeros`
[G, O * bits / 32] holds zero points, less one in `checkpoint_format` gptq and as they are in gptq_v2; `scales` [G, O];
`g_idx` [I] is the group of each input, which is not in order under `desc_act`. Reference: the torch path of AutoGPTQ
0.7.1 (`qlinear_cuda`), which computes scale * (q - zero) in the dtype of the scale.
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

WIDTHS = (2, 4, 8)
LAYOUTS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point, by `checkpoint_format`."""
SCALE_BYTES, INDEX_BYTES = 2, 4


def read(settings: Settings) -> PackedFormat:
    """Return the format of this `quantization_config`. Raises BaseModelError."""
    bits = settings.get("bits", 4)
    if bits not in WIDTHS:
        raise unsupported("bits", repr(bits), f"GPTQ weights are read with {', '.join(map(str, WIDTHS))} bits")
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if layout not in LAYOUTS:
        raise unsupported("checkpoint_format", repr(layout), f"layouts that are read: {', '.join(LAYOUTS)}")
    changed = [name for name in settings.get("dynamic") or {} if not name.startswith("-:")]
    if changed:
        raise unsupported("dynamic", repr(changed[0]), "all packed weights have the same bits and groups")
    columns, added, bits = int(settings.get("group_size", 128)), LAYOUTS[layout], int(bits)

    def packed_bytes(inputs: int, outputs: int) -> int:
        groups = group_count(inputs, columns)
        words = inputs * outputs * bits // 8 + groups * outputs * bits // 8
        return words + groups * outputs * SCALE_BYTES + (inputs * INDEX_BYTES if settings.get("desc_act") else 0)

    def dequantise(parts: Parts, dtype: "torch.dtype") -> "torch.Tensor":
        return _values(parts, bits, added).to(dtype)

    order = ", inputs reordered" if settings.get("desc_act") else ""
    skipped = (f"re:{name[2:]}" for name in settings.get("dynamic") or {})
    return PackedFormat(
        label=f"GPTQ int{bits} ({grain(columns)}{order})",
        parts=("qweight", "qzeros", "scales", "g_idx"),
        marks=("qweight",),
        dequantise=dequantise,
        prepare=_prepare,
        packed_bytes=packed_bytes,
        plain=(
            *names(settings, "modules_to_not_convert"),
            *skipped,
            *(() if settings.get("lm_head") else ("lm_head",)),
        ),
    )


def _values(parts: Parts, bits: int, added: int) -> "torch.Tensor":
    """Return scale * (q - zero) in the scale's dtype, [O, I]."""
    q_OI = unpack_columns(parts["qweight"].t(), bits)
    zero_OG, scale_OG = (unpack_columns(parts["qzeros"], bits) + added).t(), parts["scales"].t()
    if "g_idx" in parts:
        index_I = parts["g_idx"].long()
        return scale_OG[:, index_I] * (q_OI - zero_OG[:, index_I])
    q_OGn: torch.Tensor = q_OI.unflatten(1, (scale_OG.shape[1], -1))
    return (scale_OG.unsqueeze(-1) * (q_OGn - zero_OG.unsqueeze(-1))).flatten(1)


def _prepare(parts: Parts) -> Parts:
    """Return the parts without an index of groups in order."""
    import torch

    groups = len(parts["scales"])
    index = parts.get("g_idx")
    if index is None or len(index) % groups:
        return parts
    in_order = torch.arange(groups, device=index.device).repeat_interleave(len(index) // groups)
    return (
        {name: part for name, part in parts.items() if name != "g_idx"}
        if torch.equal(index.long(), in_order)
        else parts
    )
