"""Hooks into transformers, TRL, PEFT, accelerate and bitsandbytes, on the real libraries and a tiny model."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from graftwork.compat import hf, peft_bottleneck
from tests.ports import free_port
from tests.process_races import ROOT
from tests.tiny import write_tiny_base

ROWS = [{"row": 0}, {"row": 1}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("compat") / "base")


def model_of(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def usual(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "use_cpu": True,
        "activation_checkpointing": True,  # else trl sets it by the name that transformers has deprecated
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }


def test_gemma_2_alone_of_the_two_has_no_sdpa(base: Path, tmp_path: Path) -> None:
    assert hf.has_sdpa(LlamaForCausalLM)
    assert not hf.has_sdpa(Gemma2ForCausalLM)
    config = Gemma2ForCausalLM.config_class(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def test_a_set_attention_is_called_at_once_and_its_name_is_read(base: Path) -> None:
    model, calls = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa"), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("compat_counted", counted)
    assert hf.attention_name(model.config) == "sdpa"
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    hf.set_attention(model.config, "compat_counted")
    assert hf.attention_name(model.config) == "compat_counted"
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    assert len(calls) == model.config.num_hidden_layers
    hf.set_attention(model.config, "sdpa")
    model(ids)
    assert len(calls) == model.config.num_hidden_layers


def dpo_trainer(kind: type[Any], base: Path, folder: Path) -> Any:
    return kind(
        model=model_of(base),
        args=DPOConfig(**usual(folder), precompute_ref_log_probs=True, max_length=None),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def test_dpo_takes_rows_of_numbers_and_no_reference_pass(base: Path, tmp_path: Path) -> None:
    trainer = dpo_trainer(hf.without_reference_pass(hf.takes_token_rows(DPOTrainer)), base, tmp_path)
    assert trainer.train_dataset.to_list() == ROWS
    with pytest.raises(KeyError, match="chosen"):
        dpo_trainer(DPOTrainer, base, tmp_path)
    with pytest.raises(KeyError, match="prompt_ids"):  # only the pass over all rows collates
        dpo_trainer(hf.takes_token_rows(DPOTrainer), base, tmp_path)


def test_figures_of_a_step_are_those_that_trl_averages_and_clears(base: Path, tmp_path: Path) -> None:
    trainer = dpo_trainer(hf.without_reference_pass(hf.takes_token_rows(DPOTrainer)), base, tmp_path)
    figures = hf.step_figures(trainer)
    figures["own"].append(1.0)
    figures["own"].append(2.0)
    trainer.model.train()
    trainer.log({"loss": 3.0})
    assert trainer.state.log_history[-1]["own"] == 1.5
    assert not hf.step_figures(trainer)


def test_reward_takes_rows_of_numbers(base: Path, tmp_path: Path) -> None:
    def trainer_of(kind: type[Any]) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        return kind(
            model=model,
            args=RewardConfig(**usual(tmp_path), max_length=None),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(base),
        )

    assert trainer_of(hf.takes_token_rows(RewardTrainer)).train_dataset.to_list() == ROWS
    with pytest.raises(KeyError, match="chosen"):
        trainer_of(RewardTrainer)


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_rollouts_are_those_of_the_subclass(kind: type[Any], config: type[Any], base: Path, tmp_path: Path) -> None:
    """A step on answers given beforehand; TRL's own prompt and answer code never runs."""
    asked: list[Any] = []
    scored: list[Any] = []

    class Given(hf.own_rollouts(kind)):  # type: ignore[misc]
        def prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
            asked.extend(prompts)
            return [[5, 6, 7]] * len(prompts)

        def answer_ids(self) -> list[list[int]]:
            return [[8, 9, 2], [10, 2]]

        def answer_likelihoods(self, model: Any, ids: Any, mask: Any, answer: int, size: int) -> Any:
            scored.append((ids.tolist(), answer, size))
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -answer - 1 : -1].log_softmax(-1)
            return logits.gather(2, ids[:, -answer:, None]).squeeze(2), -(logits.exp() * logits).sum(-1)

        def save_model_files(self, folder: str | None, state_dict: Any) -> None:
            Path(str(folder)).mkdir(parents=True, exist_ok=True)
            (Path(str(folder)) / "ours").write_text("")

    seen: list[Any] = []

    def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append((prompts, completion_ids))
        return [1.0, 0.0]

    trainer = Given(
        model=model_of(base),
        args=config(
            **usual(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            logging_steps=1,
            max_completion_length=4,
            beta=0.1,
            gradient_accumulation_steps=1,
        ),
        reward_funcs=[reward],
        train_dataset=Dataset.from_list([{"prompt": {"row": 0}}, {"prompt": {"row": 1}}]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    assert len(asked) == 2
    assert asked[0] == asked[1], "one prompt, two answers"
    assert seen == [(asked, [[8, 9, 2], [10, 2]])]
    assert ([[5, 6, 7, 8, 9, 2], [5, 6, 7, 10, 2, 2]], 3, 2) in scored
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "ours").exists()
    assert not list((tmp_path / "saved").glob("*.safetensors"))


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_a_resumed_trainer_continues_the_count_of_passes(
    kind: type[Any], config: type[Any], base: Path, tmp_path: Path
) -> None:
    class Counted(hf.own_rollouts(kind)):  # type: ignore[misc]
        def prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
            return [[5, 6, 7]] * len(prompts)

        def answer_ids(self) -> list[list[int]]:
            return [[8, 2], [9, 2], [10, 2], [11, 2]]

        def answer_likelihoods(self, model: Any, ids: Any, mask: Any, answer: int, size: int) -> Any:
            return torch.zeros(len(ids), answer), torch.zeros(len(ids), answer)

    trainer = Counted(
        model=model_of(base),
        args=config(
            **usual(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            gradient_accumulation_steps=2,
            beta=0.0,
        ),
        reward_funcs=[lambda prompts, **_: [1.0, 0.0] * (len(prompts) // 2)],
        train_dataset=Dataset.from_list([{"prompt": {"row": 0}}, {"prompt": {"row": 1}}]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.state.global_step = 3
    trainer.model.train()
    trainer._prepare_inputs([{"prompt": {"row": row}} for row in (0, 0, 1, 1)])
    assert trainer._step == 6, "three steps of two passes"
    assert trainer._buffered_inputs is not None
    trainer._step += 1
    trainer._prepare_inputs([])
    assert trainer._step == 7, "only the first pass of an attempt sets the count"


def test_an_adapter_kind_wraps_linears_and_takes_a_second_adapter(base: Path) -> None:
    peft_bottleneck.register()
    model = AutoModelForCausalLM.from_pretrained(base)
    linear = model.model.layers[0].mlp.down_proj
    config = peft_bottleneck.BottleneckConfig(bottleneck_size=4, target_modules={"down_proj"})
    peft = get_peft_model(model, config)
    layer = peft.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, peft_bottleneck.BottleneckLayer)
    assert layer.get_base_layer() is linear
    trained = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("bottleneck_" in name for name in trained)
    peft.add_adapter("second", copy.deepcopy(config))
    assert set(layer.bottleneck_up) == {"default", "second"}
    assert layer.get_base_layer() is linear, "wrapped once"


@pytest.mark.parametrize("hooked", [True, False])
def test_accelerate_shards_on_a_cpu_with_the_hook_alone(hooked: bool) -> None:
    code = (
        "from accelerate import Accelerator\n"
        "from accelerate.utils import FullyShardedDataParallelPlugin\n"
        "from graftwork.compat.hf import shard_on_cpu\n"
        f"if {hooked}: shard_on_cpu()\n"
        "one = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))\n"
        "print(one.distributed_type.value, one.device.type)\n"
    )
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
    }
    environment = {**os.environ, **ranks, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kind, device = done.stdout.split()[-2:]
    assert device == "cpu"
    assert (kind == "FSDP") == hooked


@pytest.mark.parametrize("hooked", [False, True])
def test_ddp_writes_to_frozen_weights_without_the_hook_alone(hooked: bool, tmp_path: Path) -> None:
    """A tensor's version counts the writes to it."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    if hooked:
        hf.keep_frozen_weights(model)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        before = [layer.weight._version for layer in model]
        torch.nn.parallel.DistributedDataParallel(model)
        written = [layer.weight._version > version for layer, version in zip(model, before, strict=True)]
    finally:
        torch.distributed.destroy_process_group()
    assert written == [not hooked, True]


def test_int8_layers_do_not_log_their_casts(caplog: pytest.LogCaptureFixture) -> None:
    """The logger exists and is the one that warns: with its usual level it does."""
    import logging

    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(32, 32, has_fp16_weights=False, threshold=0.0).to("cpu").eval()
    logger = logging.getLogger("bitsandbytes.autograd._functions")

    def warned() -> int:
        caplog.clear()
        with torch.no_grad():
            layer(torch.ones(1, 32, dtype=torch.bfloat16))
        return sum(record.name == logger.name for record in caplog.records)

    logger.setLevel(logging.WARNING)
    assert warned() == 1
    hf.quiet_int8_casts()
    assert warned() == 0


def test_a_repacked_4_bit_weight_is_unpacked_to_the_same_values() -> None:
    """Repacked by bitsandbytes' own function, which needs no AVX512; its scales become bf16, 8 bits of mantissa."""
    from bitsandbytes import functional

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    plain = functional.dequantize_4bit(packed, state)
    repacked, state = functional._convert_weight_packed_for_cpu(packed, state)
    assert state.packing_format_for_cpu
    absmax, state.original_nested = state.absmax, False
    data, state = hf.unpack_cpu_layout(repacked, state)
    assert torch.equal(data, packed)
    state.absmax, state.dtype = absmax.t().reshape(-1).float(), torch.float32
    assert torch.allclose(functional.dequantize_4bit(data, state), plain, rtol=1 / 128)


def test_a_scheduler_reports_the_rates_that_were_set_until_its_next_step() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (1 + done))
    hf.set_last_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]
    assert scheduler.state_dict()["_last_lr"] == [0.25], "a checkpoint holds the same"
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]


def moe(folder: Path) -> Any:
    from tests import engines
    from tests.families import write_family

    return engines.load_model(write_family(folder, "qwen3_moe"))


def test_the_gate_of_fused_experts_is_that_of_their_class(tmp_path: Path) -> None:
    experts = moe(tmp_path).model.layers[0].mlp.experts
    gate_up_SI = torch.randn(3, 2 * experts.intermediate_dim)
    gate, up = gate_up_SI.chunk(2, dim=-1)
    assert torch.equal(hf.apply_gate(experts, gate_up_SI), torch.nn.functional.silu(gate) * up)


def test_targets_that_end_as_experts_do_are_kept(tmp_path: Path) -> None:
    """PEFT by itself takes `down_proj` of such a base for its experts'."""
    config = LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    by_peft = get_peft_model(moe(tmp_path / "a"), copy.deepcopy(config))
    assert any(".experts." in name for name, one in by_peft.named_parameters() if one.requires_grad)
    with hf.keep_targets():
        kept = get_peft_model(moe(tmp_path / "b"), config)
    assert not any(".experts." in name for name, one in kept.named_parameters() if one.requires_grad)


def test_a_lora_on_a_packed_parameter_is_taken_off_after_a_pass(tmp_path: Path) -> None:
    from torch.nn.utils import parametrize

    class AsItIs(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.clone()

    model, ids = moe(tmp_path), torch.tensor([[1, 40, 41]])
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = adapted(input_ids=ids).logits
        inner = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeExperts"]
        for experts in inner:
            for key in ("gate_up_proj", "down_proj"):
                parametrize.register_parametrization(experts, key, AsItIs())
        hf.adapt_packed_parameters()
        for _ in range(2):
            assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-5)
    assert all(len(experts.parametrizations.down_proj) == 1 for experts in inner)
