"""The real step on tensors without memory: against the closed form, and against peaks that an H100 measured."""

from typing import Any

import pytest
import torch

from graftwork.base.model_shape import ModelShape
from graftwork.planning.hardware import GIB
from graftwork.planning.memory import RowSizes, weight_bytes
from graftwork.quantization import import_bitsandbytes
from graftwork.training.planning.memory import allocated as allocated_of
from graftwork.training.planning.memory import predict_training
from graftwork.training.spec import TrainSpec
from tests.fake_step import EachResult, fake_tensors, replay, storage_key

import_bitsandbytes()

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
SMALLER = {**LLAMA_8B, "num_hidden_layers": 4, "vocab_size": 32000}
PLAIN = {"kind": "none"}


def spec(rows: int, *, again: bool, quant: dict[str, Any], adapter: dict[str, Any]) -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "name": "t",
            "base": "b",
            "data": {"train": "t.jsonl"},
            "max_length": 2048,
            "num_workers": 1,
            "gpus_per_worker": 1,
            "quant": quant,
            "adapter": adapter,
            "optim": {"rows_per_step": rows, "micro_batch": rows, "lr": 1e-5, "gradient_checkpointing": again},
        }
    )


def allocated(asked: TrainSpec, config: dict[str, Any], rows: RowSizes) -> int:
    """What the closed form says that torch's allocator gives out: without CUDA's own and without fragments."""
    plan = predict_training(asked, ModelShape.from_config(config), rows, value_bytes=2)
    return allocated_of(plan)


@pytest.mark.parametrize(
    ("adapter", "again"),
    [
        ({"kind": "lora"}, False),
        ({"kind": "lora", "targets": "attention", "dropout": 0.1}, True),
        ({"kind": "lora", "dora": True}, True),
        ({"kind": "full"}, False),
        ({"kind": "ia3"}, False),
        ({"kind": "prefix"}, False),
        ({"kind": "bottleneck", "placement": "houlsby"}, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_the_closed_form_is_what_the_real_step_takes(adapter: dict[str, Any], again: bool) -> None:
    """transformers' Llama, PEFT's layers and autograd on fake tensors: 4 blocks of Llama-3-8B, 2 rows of 1,024."""
    asked, rows = spec(2, again=again, quant=PLAIN, adapter=adapter), RowSizes.from_lengths([1024] * 2, [1023] * 2)
    found = replay(asked, SMALLER, rows, value_bytes=2)
    assert allocated(asked, SMALLER, rows) == pytest.approx(found.peak_bytes, rel=0.04)
    shape = ModelShape.from_config(SMALLER)
    frozen = 0 if adapter["kind"] == "full" else weight_bytes(shape, asked.quant, 2)
    assert found.weights == pytest.approx(frozen, rel=0.001, abs=2**16)
    assert found.optimizer == 2 * found.trained
    assert found.gradients == found.trained


def test_a_packed_base_is_replayed_at_its_size() -> None:
    asked = spec(2, again=False, quant={"kind": "nf4", "double_quant": True}, adapter={"kind": "lora"})
    rows = RowSizes.from_lengths([512] * 2, [511] * 2)
    found = replay(asked, SMALLER, rows, value_bytes=2)
    assert found.weights == pytest.approx(weight_bytes(ModelShape.from_config(SMALLER), asked.quant, 2), rel=0.001)
    assert allocated(asked, SMALLER, rows) == pytest.approx(found.peak_bytes, rel=0.06)


# One H100, random weights of Llama-3-8B's shape, 2,048 tokens, r16 on all linears, TRL 1.16's SFTTrainer (docs/log.md).

ROWS = RowSizes.from_lengths([2048] * 8, [2047] * 8)


def test_the_closed_form_against_peaks_of_an_h100() -> None:
    """TRL keeps a LoRA on a plain base in fp32, as we do, and on a quantised one in bfloat16, which takes less."""
    lora = allocated(spec(4, again=True, quant=PLAIN, adapter={"kind": "lora"}), LLAMA_8B, ROWS)
    assert lora / GIB == pytest.approx(20.1, rel=0.03)
    double = {"kind": "nf4", "double_quant": True}
    qlora = allocated(spec(4, again=True, quant=double, adapter={"kind": "lora"}), LLAMA_8B, ROWS)
    assert 9.5 < qlora / GIB < 9.5 * 1.15


@pytest.mark.soak
@pytest.mark.parametrize(
    ("quant", "adapter_dtype", "measured"),
    [(PLAIN, torch.float32, 20.1), ({"kind": "nf4", "double_quant": True}, torch.bfloat16, 9.5)],
    ids=["LoRA", "QLoRA"],
)
def test_the_replay_against_peaks_of_an_h100(
    quant: dict[str, Any], adapter_dtype: torch.dtype, measured: float
) -> None:
    asked = spec(4, again=True, quant=quant, adapter={"kind": "lora"})
    found = replay(asked, LLAMA_8B, ROWS, value_bytes=2, adapter_dtype=adapter_dtype)
    assert found.peak_bytes / GIB == pytest.approx(measured, rel=0.05)


# The hooks into torch of the fake step: each test fails when torch changes the name, the signature or the behaviour.


def test_fake_tensors_have_storages_of_their_size_and_no_memory() -> None:
    outside = torch.ones(4, 2)
    with fake_tensors():
        huge = torch.empty(2**20, 2**20, dtype=torch.float32)  # 4 TiB
        assert huge.untyped_storage().nbytes() == 2**42
        assert huge.device.type == "cpu"
        assert (torch.empty(3, 4) @ outside).shape == (3, 2), "tensors from outside take part"


def test_each_result_sees_the_forward_and_the_backward_pass() -> None:
    shapes: list[tuple[int, ...]] = []
    with fake_tensors(), EachResult(lambda tensor: shapes.append(tuple(tensor.shape))):
        weight = torch.empty(5, 7, requires_grad=True)
        values, places = torch.empty(3, 7).topk(2)  # two tensors in one result
        product = torch.nn.functional.linear(torch.empty(3, 7), weight)
        assert shapes[-1] == (3, 5)
        assert shapes.count((3, 2)) == 2
        assert values.shape == places.shape
        shapes.clear()
        product.sum().backward()
    assert (5, 7) in shapes, "the weight's gradient is an operation of the backward pass"


def test_the_key_of_a_storage_is_shared_by_its_views_alone() -> None:
    with fake_tensors():
        tensor, other = torch.empty(4, 4), torch.empty(4, 4)
        keys = {storage_key(one.untyped_storage()) for one in (tensor, tensor.t(), tensor[1:], tensor.detach())}
        assert len(keys) == 1
        assert storage_key(other.untyped_storage()) not in keys


QWEN_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
    "mlp_only_layers": [],
}
MIXTRAL = {**SMALLER, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
GLM_MOE = {
    **QWEN_MOE,
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize("adapter", [{"kind": "lora"}, {"kind": "lora", "experts": True}], ids=["lora", "experts"])
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "config",
    [
        QWEN_MOE,
        pytest.param(MIXTRAL, marks=pytest.mark.long),
        pytest.param(GLM_MOE, marks=pytest.mark.long),
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_the_closed_form_of_experts_is_what_the_real_step_takes(
    config: dict[str, Any], adapter: dict[str, Any], again: bool
) -> None:
    """4 blocks of Qwen3-30B-A3B, Mixtral-8x7B, GLM-4.5-Air, 2 rows of 1,024; the peak less the frozen weights too."""
    asked, rows = spec(2, again=again, quant=PLAIN, adapter=adapter), RowSizes.from_lengths([1024] * 2, [1023] * 2)
    found, shape = replay(asked, config, rows, value_bytes=2), ModelShape.from_config(config)
    assert allocated(asked, config, rows) == pytest.approx(found.peak_bytes, rel=0.02)
    added = allocated(asked, config, rows) - weight_bytes(shape, asked.quant, 2)
    assert added == pytest.approx(found.peak_bytes - found.weights, rel=0.05)
    assert found.trained == 4 * asked.adapter.trained_params(shape)
    assert found.weights == pytest.approx(2 * shape.params, rel=0.001)


# Attention that keeps a matrix of scores a block (eager: Gemma-2's soft cap, gpt-oss' sinks), and latent attention.

GEMMA_2 = {
    "model_type": "gemma2",
    "vocab_size": 32000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 32000,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    **QWEN_MOE,
    "model_type": "deepseek_v3",
    "head_dim": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 32,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
LORA, DROPPED = {"kind": "lora"}, {"kind": "lora", "targets": "attention", "dropout": 0.1}
EXPERTS, PREFIX = {"kind": "lora", "experts": True}, {"kind": "prefix"}
DOUBLE = {"kind": "nf4", "double_quant": True}


@pytest.mark.parametrize(
    ("config", "length", "again", "adapter", "quant"),
    [
        (GEMMA_2, 1024, False, LORA, PLAIN),
        (GPT_OSS, 1024, True, LORA, PLAIN),
        (DEEPSEEK, 1024, False, LORA, PLAIN),
        *(
            pytest.param(*one, marks=pytest.mark.long)
            for one in (
                *(
                    (config, length, again, LORA, PLAIN)
                    for config in (GEMMA_2, GPT_OSS, DEEPSEEK)
                    for length in (512, 2048)
                    for again in (False, True)
                ),
                *((GEMMA_2, 1024, again, LORA, DOUBLE) for again in (False, True)),
                *((GPT_OSS, 1024, again, adapter, PLAIN) for again in (False, True) for adapter in (DROPPED, EXPERTS)),
                (GEMMA_2, 1024, False, PREFIX, PLAIN),
            )
        ),
    ],
    ids=lambda value: (
        str(value.get("model_type") or "-".join(map(str, value.values()))) if isinstance(value, dict) else str(value)
    ),
)
def test_attention_beyond_sdpa_is_what_the_real_step_takes(
    config: dict[str, Any], length: int, again: bool, adapter: dict[str, Any], quant: dict[str, Any]
) -> None:
    """2 blocks of Gemma-2-9B, gpt-oss-20b and a small DeepSeek-V3, 2 rows; the peak less the frozen weights too."""
    asked, rows = spec(2, again=again, quant=quant, adapter=adapter), RowSizes.from_lengths([length] * 2, [length] * 2)
    found = replay(asked, config, rows, value_bytes=2)
    planned = allocated(asked, config, rows)
    assert planned == pytest.approx(found.peak_bytes, rel=0.06)
    weights = weight_bytes(ModelShape.from_config(config), asked.quant, 2)
    assert planned - weights == pytest.approx(found.peak_bytes - found.weights, rel=0.09)


def test_a_plan_says_what_is_kept_of_scores_and_where_it_is_a_bound() -> None:
    shape = ModelShape.from_config(GPT_OSS)
    for adapter, said in ((LORA, "keeps 2 bytes for"), ({"kind": "full"}, "keeps 6 bytes, at most, for")):
        plan = predict_training(spec(2, again=True, quant=PLAIN, adapter=adapter), shape, ROWS, value_bytes=2)
        assert any(f"attention {said}" in note for note in plan.assumptions)


@pytest.mark.parametrize("config", [SMALLER, pytest.param(GPT_OSS, marks=pytest.mark.long)], ids=["llama", "gpt-oss"])
def test_a_pass_that_scores_rows_is_on_top_of_what_training_keeps(config: dict[str, Any]) -> None:
    rows = RowSizes.from_lengths([1024] * 2, [1023] * 2)
    asked = spec(2, again=False, quant=PLAIN, adapter=LORA).with_({"objective": {"kind": "kto"}})
    found = replay(asked, config, rows, value_bytes=2)
    assert allocated(asked, config, rows) == pytest.approx(found.peak_bytes, rel=0.03)
