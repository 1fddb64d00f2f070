"""Exact values of packed weights. Sources: each format's own library, by digest or in this process."""

from typing import Any

import pytest
import torch

from graftwork.errors import BaseModelError
from graftwork.prequantized.detect import find_format, without_format
from graftwork.prequantized.format import PackedFormat
from tests.packed_checkpoints import (
    PACKINGS,
    Tensors,
    awq,
    bnb_4bit,
    bnb_int8,
    ct_settings,
    digest,
    fp8_blocks,
    sample_weight,
)

REFERENCE_DIGESTS = {
    "fp8 blocks": "8db85e00255a28af",
    "fp8 cut blocks": "a51c461cc64360db",
    "fp8 tensor": "83bfcdbf7f035a2d",
    "ct fp8 rows": "35bb0fdb35316f2c",
    "ct fp8 tensor": "83bfcdbf7f035a2d",
    "ct fp8 blocks": "68d6f4579fe05c11",
    "ct int8 rows": "2820661c02461b29",
    "ct int8 zeros": "404937f74955b4e5",
    "ct int4 groups": "7a2642b566454ba2",
    "ct int4 zeros": "3a89027ca501a0fb",
    "ct int8 groups": "951e4ca989b264f9",
    "awq": "02bff39f0ca661f8",
    "gptq": "02bff39f0ca661f8",
    "gptq reordered": "1736a3fdb99800d9",
    "gptq int8": "000728bf46044c7a",
    "gptq int2": "18ed2c72525ad400",
    "torchao int8": "91a8cdfeeebd4e47",
    "torchao intx": "3a89027ca501a0fb",
    "torchao fp8": "c0dcb57d827a19fb",
}
"""As `python -m tests.packed_reference` printed them: transformers 5.24 and compressed-tensors 0.20.1 (fp8),
compressed-tensors 0.20.1 (ct), AutoAWQ 0.2.9, AutoGPTQ 0.7.1, torchao 0.18.0."""


def format_of(name: str) -> PackedFormat:
    found = find_format({"quantization_config": PACKINGS[name].settings})
    assert found is not None
    return found


def values(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return exact(name, PACKINGS[name].pack(sample_weight()), dtype)


def exact(name: str, parts: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    packed = format_of(name)
    return packed.dequantise(packed.prepare(parts), dtype)


@pytest.mark.parametrize("name", REFERENCE_DIGESTS)
def test_values_are_those_of_the_formats_own_library(name: str) -> None:
    assert digest(values(name)) == REFERENCE_DIGESTS[name]
    assert torch.equal(values(name, torch.bfloat16), values(name).bfloat16())


def test_gptq_v2_stores_the_same_weights_with_other_zero_points() -> None:
    first, second = (PACKINGS[name].pack(sample_weight()) for name in ("gptq", "gptq v2"))
    assert not torch.equal(first["qzeros"], second["qzeros"])
    assert torch.equal(values("gptq v2"), values("gptq"))


def test_gptq_without_an_index_has_its_groups_in_order() -> None:
    parts = PACKINGS["gptq"].pack(sample_weight())
    del parts["g_idx"]
    assert torch.equal(exact("gptq", parts), values("gptq"))


def test_a_group_index_of_compressed_tensors_orders_the_scales() -> None:
    """Source: the same weights with their columns in the order of the groups."""
    weight, order = sample_weight(), torch.randperm(96, generator=torch.Generator().manual_seed(3))
    parts = PACKINGS["ct int4 groups"].pack(weight[:, order])
    expected = torch.empty_like(weight)
    expected[:, order] = exact("ct int4 groups", parts)
    group = torch.empty(96, dtype=torch.int32)
    group[order] = (torch.arange(96) // 16).int()
    packed = PACKINGS["ct int4 groups"].pack(weight)["weight_packed"]
    q_sorted = (parts["weight_packed"].unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    q = torch.empty(64, 96, dtype=torch.int64)
    q[:, order] = q_sorted.flatten(1).long()
    parts["weight_packed"] = (q.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1).int()
    assert parts["weight_packed"].shape == packed.shape
    found = exact("ct int4 groups", {**parts, "weight_g_idx": group})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_values_of_bitsandbytes_are_its_own(double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(sample_weight().bfloat16(), quant_type="nf4", compress_statistics=double)
    found = exact("bnb nf4", bnb_4bit(double=double)(sample_weight()))
    state.dtype = torch.float32
    assert torch.equal(found, dequantize_4bit(packed, state))


def test_int8_values_of_bitsandbytes_are_row_scales_times_bytes() -> None:
    parts = bnb_int8(sample_weight())
    expected = parts["weight"].float() * (parts["SCB"].float() * (1 / 127))[:, None]
    torch.testing.assert_close(values("bnb int8"), expected, rtol=1e-6, atol=0)


def test_fbgemm_scales_rows() -> None:
    parts = PACKINGS["fbgemm fp8"].pack(sample_weight())
    assert torch.equal(values("fbgemm fp8"), parts["weight"].float() * parts["weight_scale"].float())


def test_torchao_int4_adds_its_zeros() -> None:
    """Source: the definition of Int4Tensor's zero points, q * scale + zero; torchao computes it on CUDA alone."""
    weight = sample_weight()
    error = (values("torchao int4") - weight).abs().amax()
    step = PACKINGS["torchao int4"].pack(weight)["_weight_scale"].float().amax()
    assert error <= 0.55 * step, "the nearest of 16 values, and the rounding of scale and zero to bf16"


def test_fp8_blocks_equal_those_of_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts = fp8_blocks(16, 32)(sample_weight())
    given = {"weight": [parts["weight"]], "weight_scale_inv": [parts["weight_scale_inv"]]}
    found = Fp8Dequantize(None).convert(given)["weight"]
    expected = found[0] if isinstance(found, list) else found
    assert torch.equal(values("fp8 blocks"), expected.float())


def test_fp8_scales_may_be_powers_of_two_in_a_byte() -> None:
    weight, exponent = sample_weight().to(torch.float8_e4m3fn), torch.full((4, 3), 124, dtype=torch.uint8)
    found = exact("fp8 blocks", {"weight": weight, "weight_scale_inv": exponent})
    assert torch.equal(found, weight.float() / 8)


def test_mxfp4_values_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    seeded = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 2, 16), generator=seeded, dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 64, 2), generator=seeded, dtype=torch.uint8)
    packed = find_format({"quantization_config": {"quant_method": "mxfp4"}})
    assert packed is not None
    for dtype in (torch.bfloat16, torch.float32):
        found = packed.dequantise({"blocks": blocks, "scales": scales}, dtype)
        assert found.shape == (3, 64, 64)
        assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=dtype))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "hqq"}, r"quantization_config.quant_method: 'hqq'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, r"quantization_config.fmt: 'e5m2'"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"quantization_config.weight_block_size: \[128\]"),
    ({"quant_method": "awq", "bits": 3}, r"quantization_config.bits: 3"),
    ({"quant_method": "awq", "version": "gemv"}, r"quantization_config.version: 'gemv'"),
    ({"quant_method": "awq", "zero_point": False}, r"quantization_config.zero_point: False"),
    ({"quant_method": "gptq", "bits": 3}, r"quantization_config.bits: 3"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, r"quantization_config.checkpoint_format: 'marlin'"),
    ({"quant_method": "gptq", "dynamic": {"+:.*down": {"bits": 8}}}, r"quantization_config.dynamic: '\+:.*down'"),
    (ct_settings("nvfp4-pack-quantized", num_bits=4), r"quantization_config.format: 'nvfp4-pack-quantized'"),
    (ct_settings("pack-quantized", num_bits=3, strategy="group"), r"config_groups.weights.num_bits: 3"),
    (ct_settings("int-quantized", num_bits=8, strategy="token"), r"config_groups.weights.strategy: 'token'"),
    ({**ct_settings("int-quantized", num_bits=8), "transform_config": {"a": 1}}, r"transform_config: set"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, r"config_groups: 0 groups"),
    ({"quant_method": "gptq", "group_size": "many"}, r"quant_method=gptq: it cannot be read"),
]


@pytest.mark.parametrize(("settings", "error"), REFUSED)
def test_a_setting_that_is_not_read_is_an_error_that_names_it(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(BaseModelError, match=error):
        find_format({"quantization_config": settings})


def test_a_text_part_may_hold_the_settings() -> None:
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 8, "quantization_config": {"quant_method": "fp8"}}}
    found = find_format(config)
    assert found is not None
    assert found.label.startswith("FP8")
    assert without_format(config) == {"model_type": "gemma3", "text_config": {"hidden_size": 8}}
    assert find_format(without_format(config)) is None


def test_modules_that_stay_plain_are_named_by_parts_or_expressions() -> None:
    found = find_format({"quantization_config": {**PACKINGS["ct int8 rows"].settings, "ignore": ["re:.*down", "gate"]}})
    assert found is not None
    assert not found.packs("model.layers.0.mlp.down_proj")
    assert not found.packs("model.layers.3.mlp.gate")
    assert found.packs("model.layers.0.mlp.gate_proj")


def test_awq_may_have_one_scale_an_output() -> None:
    packed = find_format({"quantization_config": {**PACKINGS["awq"].settings, "group_size": -1}})
    assert packed is not None
    found = packed.dequantise(awq(96)(sample_weight()), torch.float32)
    assert (found - sample_weight()).abs().amax() < 0.02


@pytest.mark.parametrize("name", ["ct int8 rows", "fp8 blocks"])
def test_weights_that_were_not_rounded_to_bytes_are_an_error(name: str) -> None:
    parts = {**PACKINGS[name].pack(sample_weight()), "weight": sample_weight().bfloat16()}
    with pytest.raises(ValueError, match="weight is stored as torch.bfloat16"):
        exact(name, parts)


def test_every_fp8_value_is_that_of_torch() -> None:
    bytes_256 = torch.arange(256, dtype=torch.uint8)
    for rows in (bytes_256[(bytes_256 & 0x7F) != 0x7F][None], bytes_256[None]):  # without NaN, and with
        weight = rows.view(torch.float8_e4m3fn)
        found = exact("fp8 tensor", {"weight": weight, "weight_scale": torch.tensor(1.0)})
        assert torch.equal(found.view(torch.int32), weight.float().view(torch.int32))
