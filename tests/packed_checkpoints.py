"""Quantised checkpoints that tests write: weights rounded to the nearest value and packed by numpy, bit by bit.

Nothing here reads the product's own formats. `tests.packed_reference` gives the values by each format's library.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
E4M3_MAX = 448.0
INT4 = 4


@dataclass(frozen=True)
class Packing:
    """One format with one setting: `quantization_config`, and the tensors of a weight [O, I] (fp32)."""

    settings: dict[str, Any]
    pack: Callable[[torch.Tensor], Tensors]
    header: Callable[[str], str] | None = None
    """Entry of the file's header for a weight's name (torchao)."""


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned values [R, N] in int32 words [R, N * bits / 32]: value i of a word takes the bits from i * bits on."""
    rows, count = values.shape
    per_word = 32 // bits
    padded = np.zeros((rows, -(-count // per_word) * per_word), dtype=np.uint32)
    padded[:, :count] = values.numpy().astype(np.uint32)
    out = np.zeros((rows, padded.shape[1] // per_word), dtype=np.uint32)
    for place in range(per_word):
        out |= padded[:, place::per_word] << np.uint32(bits * place)
    return torch.from_numpy(out.view(np.int32).copy())


def nearest(weight: torch.Tensor, bits: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return (unsigned q [O, I], zero [O, G], scale [O, G] in the dtype) of groups of columns."""
    grouped = weight.unflatten(1, (-1, columns))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).to(dtype)
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    q = (grouped / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return q.flatten(1).int(), zero.int(), scale


def symmetric(weight: torch.Tensor, bits: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (signed q [O, I], scale [O, G] in the dtype) of groups of columns."""
    grouped, most = weight.unflatten(1, (-1, columns)), 2 ** (bits - 1)
    scale = (grouped.abs().amax(-1) / (most - 1)).to(dtype)
    q = (grouped / scale.float().unsqueeze(-1)).round().clamp(-most, most - 1)
    return q.flatten(1).int(), scale


def fp8_blocks(rows: int, columns: int) -> Callable[[torch.Tensor], Tensors]:
    """FP8 with a scale a block; blocks at the end are cut off."""

    def pack(weight: torch.Tensor) -> Tensors:
        (high, wide), grid = weight.shape, (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        scale, q = torch.empty(grid), torch.empty(high, wide, dtype=torch.float8_e4m3fn)
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scale[i, j] = weight[part].abs().amax() / E4M3_MAX
                q[part] = (weight[part] / scale[i, j]).to(q.dtype)
        return {"weight": q, "weight_scale_inv": scale}

    return pack


def ct_fp8_blocks(rows: int, columns: int) -> Callable[[torch.Tensor], Tensors]:
    """The same under compressed-tensors' names, with bf16 scales."""

    def pack(weight: torch.Tensor) -> Tensors:
        parts = fp8_blocks(rows, columns)(weight)
        return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"].to(torch.bfloat16)}

    return pack


def fp8_tensor(weight: torch.Tensor) -> Tensors:
    """FP8 with one scale, and one of the activations."""
    scale = weight.abs().amax() / E4M3_MAX
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale, "input_scale": torch.tensor(0.5)}


def fp8_rows(weight: torch.Tensor) -> Tensors:
    """FP8 with a bf16 scale a row."""
    scale = (weight.abs().amax(1, keepdim=True) / E4M3_MAX).to(torch.bfloat16)
    return {"weight": (weight / scale.float()).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_rows_fp32(weight: torch.Tensor) -> Tensors:
    """FP8 with an fp32 scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def int8_rows(weight: torch.Tensor) -> Tensors:
    """int8 with a bf16 scale a row."""
    q, scale = symmetric(weight, 8, weight.shape[1], torch.bfloat16)
    return {"weight": q.to(torch.int8), "weight_scale": scale}


def int8_rows_zero(weight: torch.Tensor) -> Tensors:
    """int8 with a bf16 scale and a zero point a row."""
    q, zero, scale = nearest(weight, 8, weight.shape[1], torch.bfloat16)
    stored = {"weight": (q - 128).to(torch.int8), "weight_zero_point": (zero - 128).to(torch.int8)}
    return {**stored, "weight_scale": scale}


def packed_groups(bits: int, columns: int, *, zeros: bool = False) -> Callable[[torch.Tensor], Tensors]:
    """compressed-tensors' `pack-quantized`."""

    def pack(weight: torch.Tensor) -> Tensors:
        shape = {"weight_shape": torch.tensor(weight.shape)}
        if zeros:
            q, zero, scale = nearest(weight, bits, columns, torch.bfloat16)
            packed_zero = words(zero.t().contiguous(), bits).t().contiguous()
            return {"weight_packed": words(q, bits), "weight_scale": scale, "weight_zero_point": packed_zero, **shape}
        signed, scale = symmetric(weight, bits, columns, torch.bfloat16)
        return {"weight_packed": words(signed + 2 ** (bits - 1), bits), "weight_scale": scale, **shape}

    return pack


def awq(columns: int) -> Callable[[torch.Tensor], Tensors]:
    """AutoAWQ's gemm layout: place i of a word holds output ORDER[i] of eight."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(weight: torch.Tensor) -> Tensors:
        q, zero, scale = nearest(weight, INT4, columns, torch.float16)

        def reordered(values: torch.Tensor) -> torch.Tensor:
            return words(values.t().unflatten(1, (-1, 8))[:, :, order].flatten(1).contiguous(), INT4)

        return {"qweight": reordered(q), "qzeros": reordered(zero), "scales": scale.t().contiguous()}

    return pack


def gptq(bits: int, columns: int, *, version: int = 1, reorder: bool = False) -> Callable[[torch.Tensor], Tensors]:
    """AutoGPTQ's layout; version 1 stores zero points less one."""

    def pack(weight: torch.Tensor) -> Tensors:
        wide = weight.shape[1]
        order = torch.randperm(wide, generator=torch.Generator().manual_seed(1)) if reorder else torch.arange(wide)
        q_sorted, zero, scale = nearest(weight[:, order], bits, columns, torch.float16)
        zero = zero.clamp(min=1)
        q, group = torch.empty_like(q_sorted), torch.empty(wide, dtype=torch.int32)
        q[:, order], group[order] = q_sorted, (torch.arange(wide) // columns).int()
        return {
            "qweight": words(q, bits).t().contiguous(),
            "qzeros": words(zero.t().contiguous() - (1 if version == 1 else 0), bits),
            "scales": scale.t().contiguous(),
            "g_idx": group,
        }

    return pack


def torchao_int8(weight: torch.Tensor) -> Tensors:
    """Int8Tensor: an fp32 scale a row."""
    q, scale = symmetric(weight, 8, weight.shape[1], torch.float32)
    zero = torch.zeros(len(q), 1, dtype=torch.int8)
    return {"_weight_qdata": q.to(torch.int8), "_weight_scale": scale, "_weight_zero_point": zero}


def torchao_intx(columns: int) -> Callable[[torch.Tensor], Tensors]:
    """IntxUnpackedToInt8Tensor: 4-bit values in bytes."""

    def pack(weight: torch.Tensor) -> Tensors:
        q, zero, scale = nearest(weight, INT4, columns, torch.bfloat16)
        stored = {"_weight_qdata": (q - 8).to(torch.int8), "_weight_zero_point": (zero - 8).to(torch.int8)}
        return {**stored, "_weight_scale": scale}

    return pack


def torchao_int4(columns: int) -> Callable[[torch.Tensor], Tensors]:
    """Int4Tensor: signed nibbles, scales and zeros [G, O]; value = q * scale + zero."""

    def pack(weight: torch.Tensor) -> Tensors:
        q, zero, scale = nearest(weight, INT4, columns, torch.bfloat16)
        nibbles = (q - 8) & 0xF
        packed = (nibbles[:, ::2] | nibbles[:, 1::2] << INT4).to(torch.uint8).view(torch.int8)
        shift = ((8 - zero) * scale.float()).to(torch.bfloat16)
        return {
            "_weight_qdata": packed,
            "_weight_scale": scale.t().contiguous(),
            "_weight_zero_point": shift.t().contiguous(),
        }

    return pack


def torchao_fp8(weight: torch.Tensor) -> Tensors:
    """Float8Tensor: an fp32 scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    return {"_weight_qdata": (weight / scale).to(torch.float8_e4m3fn), "_weight_scale": scale}


def bnb_4bit(*, double: bool) -> Callable[[torch.Tensor], Tensors]:
    """bitsandbytes' own quantiser and its form of `save_pretrained`."""

    def pack(weight: torch.Tensor) -> Tensors:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=double)
        return {"weight": packed, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}

    return pack


def bnb_int8(weight: torch.Tensor) -> Tensors:
    """bitsandbytes' own quantiser."""
    from bitsandbytes.functional import int8_vectorwise_quant

    q, scale, _ = int8_vectorwise_quant(weight.half())
    return {"weight": q, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def ct_settings(kind: str, **weights: Any) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def ao_settings(kind: str, **data: Any) -> dict[str, Any]:
    """`quantization_config` of torchao."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": data}}}


def ao_header(kind: str) -> Callable[[str], str]:
    """Header of torchao's files, as far as readers need it."""
    return lambda name: json.dumps({"_type": kind, "_data": {}, "_tensor_data_names": ["qdata", "scale"]})


GROUP = 16
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "group_size": GROUP}
PACKINGS: dict[str, Packing] = {
    "fp8 blocks": Packing({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8_blocks(16, 32)),
    "fp8 cut blocks": Packing({"quant_method": "fp8", "weight_block_size": [24, 40]}, fp8_blocks(24, 40)),
    "fp8 tensor": Packing({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "fbgemm fp8": Packing({"quant_method": "fbgemm_fp8"}, fp8_rows_fp32),
    "ct fp8 rows": Packing(ct_settings("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_rows),
    "ct fp8 tensor": Packing(ct_settings("float-quantized", num_bits=8, type="float", strategy="tensor"), fp8_tensor),
    "ct fp8 blocks": Packing(
        ct_settings("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[24, 40]),
        ct_fp8_blocks(24, 40),
    ),
    "ct int8 rows": Packing(ct_settings("int-quantized", num_bits=8, strategy="channel"), int8_rows),
    "ct int8 zeros": Packing(
        ct_settings("int-quantized", num_bits=8, strategy="channel", symmetric=False), int8_rows_zero
    ),
    "ct int4 groups": Packing(
        ct_settings("pack-quantized", num_bits=4, strategy="group", group_size=GROUP), packed_groups(4, GROUP)
    ),
    "ct int4 zeros": Packing(
        ct_settings("pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False),
        packed_groups(4, GROUP, zeros=True),
    ),
    "ct int8 groups": Packing(
        ct_settings("pack-quantized", num_bits=8, strategy="group", group_size=GROUP), packed_groups(8, GROUP)
    ),
    "awq": Packing({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq(GROUP)),
    "gptq": Packing({**GPTQ, "bits": 4}, gptq(4, GROUP)),
    "gptq reordered": Packing({**GPTQ, "bits": 4, "desc_act": True}, gptq(4, GROUP, reorder=True)),
    "gptq v2": Packing({**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, GROUP, version=2)),
    "gptq int8": Packing({**GPTQ, "bits": 8}, gptq(8, GROUP)),
    "gptq int2": Packing({**GPTQ, "bits": 2}, gptq(2, GROUP)),
    "torchao int8": Packing(ao_settings("Int8WeightOnlyConfig"), torchao_int8, ao_header("Int8Tensor")),
    "torchao intx": Packing(
        ao_settings("IntxWeightOnlyConfig", granularity={"_type": "PerGroup", "_data": {"group_size": GROUP}}),
        torchao_intx(GROUP),
        ao_header("IntxUnpackedToInt8Tensor"),
    ),
    "torchao int4": Packing(
        ao_settings("Int4WeightOnlyConfig", group_size=GROUP), torchao_int4(GROUP), ao_header("Int4Tensor")
    ),
    "torchao fp8": Packing(ao_settings("Float8WeightOnlyConfig"), torchao_fp8, ao_header("Float8Tensor")),
    "bnb nf4": Packing(NF4, bnb_4bit(double=False)),
    "bnb nf4 double": Packing({**NF4, "bnb_4bit_use_double_quant": True}, bnb_4bit(double=True)),
    "bnb int8": Packing({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8),
}
"""Formats of linear layers."""


def sample_weight() -> torch.Tensor:
    """Return the weight of the reference digests: [64, 96], fp32, the same on every machine."""
    values = np.random.default_rng(15).integers(-(2**20), 2**20, size=(64, 96))
    return torch.from_numpy(values.astype(np.float32) / 2**22)


def write_packed(base: Path, folder: Path, packing: Packing, *, files: int = 1) -> Path:
    """Write the base in folder `base` with each projection packed: config.json, tokenizer, and `files` safetensors."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    packed: Tensors = {}
    header: dict[str, str] = {"format": "pt"}
    names = []
    for path in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            module = name.removesuffix(".weight")
            names.append(name)
            if not module.endswith("_proj"):
                packed[name] = tensor
                header |= {name: json.dumps({"_type": "Tensor"})} if packing.header else {}
                continue
            packed |= {f"{module}.{part}": value.contiguous() for part, value in packing.pack(tensor.float()).items()}
            header |= {name: packing.header(name)} if packing.header else {}
    if packing.header:
        header["tensor_names"] = json.dumps(names)
    _write_files(packed, folder, files, header)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": packing.settings}))
    return folder


def _write_files(tensors: Tensors, folder: Path, files: int, header: dict[str, str]) -> None:
    """In the order of the names, so that a weight's parts may come into different files."""
    keys, places = sorted(tensors), dict[str, str]()
    size = -(-len(keys) // files)
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        part = {key: tensors[key] for key in keys[number * size : (number + 1) * size]}
        save_file(part, folder / name, header)
        places |= dict.fromkeys(part, name)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def digest(values: torch.Tensor) -> str:
    """Return 16 hex digits over the shape and the exact values of a weight."""
    text = f"{list(values.shape)}".encode()
    return hashlib.sha256(text + values.float().contiguous().numpy().tobytes()).hexdigest()[:16]
