"""Experts in 4 bits: bitsandbytes' own values, trained under a LoRA and served, packed and dequantised."""

from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.adapters.experts import expert_weights
from graftwork.adapters.lora import LoraSpec
from graftwork.base import load as base_model
from graftwork.base.load import LoadedBase
from graftwork.base.model_shape import ModelShape
from graftwork.base.source import BaseSpec
from graftwork.base.support import check_training
from graftwork.errors import BaseModelError
from graftwork.planning.memory import weight_bytes
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.engine import NativeEngine
from graftwork.training.adapters.attach import attach
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests import engines
from tests.families import config_of, write_family
from tests.training import task, write_rows

PACKED = QuantSpec(kind="nf4", resident="packed", dtype="float32")
IDS = torch.tensor([[1, 40, 41, 42, 300, 12]])


def loaded(base: Path, quant: QuantSpec, purpose: Any = "train") -> LoadedBase:
    return base_model.load(base_model.resolve(BaseSpec(uri=str(base))), quant, device="cpu", purpose=purpose)


def of(model: Any, name: str) -> torch.Tensor:
    module, _, key = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(module), key)
    return tensor


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
def test_the_values_are_those_of_bitsandbytes(kind: str, double: bool, tmp_path: Path) -> None:
    """Each expert as `Linear4bit` of it has: of plain scales bit for bit; quantised scales share blocks of 256.

    bitsandbytes 0.50 unpacks rows of other sizes than multiples of 64 wrongly on a CPU, linear layers' as well.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = write_family(tmp_path / "base", kind)
    plain = engines.load_model(base)
    found = loaded(base, PACKED.model_copy(update={"double_quant": double}))
    names = [one.name for one in expert_weights(plain)]
    assert names == [one.name for one in expert_weights(found.model)]
    for name in names:
        whole = dequantize_4bit(*quantize_4bit(of(plain, name).data, quant_type="nf4", compress_statistics=double))
        assert torch.equal(of(found.model, name), whole)
        if not double and whole.shape[-1] % 64 == 0:
            for expert, weight in enumerate(of(plain, name).data):
                alone = dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4"))
                assert torch.equal(whole[expert], alone)


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
def test_the_plan_counts_their_bytes(double: bool, tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "qwen3_moe")
    quant = PACKED.model_copy(update={"double_quant": double})
    shape = ModelShape.from_config(config_of("qwen3_moe"))
    found = loaded(base, quant)
    # tables and sizes of bitsandbytes' states next to the scales: some 300 bytes a tensor, much on a tiny base
    tensors = len(shape.experts) * shape.expert_blocks + sum(one.count for one in shape.linears)
    assert found.stored_bytes == pytest.approx(weight_bytes(shape, quant), abs=1400 * tensors)
    assert found.stored_bytes < 0.6 * shape.params * 4


def test_a_dequantised_base_has_the_same_logits(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "mixtral")
    packed = loaded(base, PACKED)
    plain = loaded(base, PACKED.model_copy(update={"resident": "dequantised"}), "serve")
    assert plain.resident_bytes > plain.stored_bytes
    assert plain.stored_bytes == packed.stored_bytes
    with torch.no_grad():
        assert torch.equal(packed.model(input_ids=IDS).logits, plain.model(input_ids=IDS).logits)
    assert not any("parametrizations" in name for name, _ in plain.model.named_parameters())


def test_a_lora_on_packed_experts_is_that_on_their_values(tmp_path: Path) -> None:
    """Logits and gradients, over three passes: PEFT 0.21 itself would add the LoRA once more in each."""
    base = write_family(tmp_path / "base", "qwen3_moe")
    results = []
    for resident in ("packed", "dequantised"):
        model = loaded(base, PACKED.model_copy(update={"resident": resident})).model
        torch.manual_seed(0)
        attached = attach(model, LoraSpec(rank=2, experts=True)).train()
        with torch.no_grad():
            for name, parameter in attached.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
        for _ in range(3):
            attached.zero_grad()
            logits = attached(input_ids=IDS).logits
            logits.square().mean().backward()
        gradients = {name: one.grad for name, one in attached.named_parameters() if one.grad is not None}
        results.append((logits.detach(), gradients))
    (logits, gradients), (expected, theirs) = results
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == theirs.keys()
    assert any(".experts." in name for name in gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("experts", [False, True], ids=["attention", "experts"])
def test_a_lora_is_trained_and_served_on_them(experts: bool, tmp_path: Path) -> None:
    """Greedy tokens of the engine, packed and dequantised, are those of transformers and PEFT on the same weights."""
    from peft import PeftModel

    base = write_family(tmp_path / "base", "qwen3_moe")
    write_rows(tmp_path / "train.jsonl", 16)
    write_rows(tmp_path / "eval.jsonl", 4, first=1000)
    adapter: dict[str, Any] = {"rank": 4, "experts": experts}
    keys = {"quant.kind": "nf4", "optim.rows_per_step": 8, "optim.micro_batch": 4, "optim.gradient_checkpointing": True}
    spec = task(tmp_path, **{**keys, "quant.resident": "packed", "adapter": adapter})
    losses: list[float] = []
    run_steps(TrainJob(spec, prepare(spec)), lambda step: losses.append(step.loss) is None)  # type: ignore[func-returns-value]
    assert losses[-1] < losses[0]
    folder = engines.write_peft(base, tmp_path / "a", 1, LoraSpec(**adapter).peft_config(engines.load_model(base)))
    prompts = [[1, 40, 41, 42], [1, 300, 12, 13, 14, 15, 99]]
    answers = []
    for resident in ("packed", "dequantised"):
        # for training: in eval mode bitsandbytes' fused CPU kernel of linear layers rounds to bf16
        model = loaded(base, PACKED.model_copy(update={"resident": resident})).model
        engine = NativeEngine(model, engines.spec(), "cpu")
        engine.load_adapter("v", folder)
        engine.start()
        asked = [engines.request(f"{n}{a}", p, a, max_new_tokens=8) for n, p in enumerate(prompts) for a in (None, "v")]
        answers.append([answer.tokens for answer in engines.ask(engine, *asked)])
        engine.stop()
    dequantised = PACKED.model_copy(update={"resident": "dequantised"})
    reference = [loaded(base, dequantised).model, PeftModel.from_pretrained(loaded(base, dequantised).model, folder)]
    expected = [greedy(model.eval(), prompt) for prompt in prompts for model in reference]
    assert answers == [expected, expected]


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(8):
        logits_1TV = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, logits_1TV[:, -1:].argmax(-1)], dim=1)
    answer: list[int] = ids[0, len(prompt) :].tolist()
    return answer


def test_eight_bits_and_shards_of_packed_experts_are_refused() -> None:
    config = config_of("mixtral")
    given = {"name": "t", "base": "b", "data": {"train": "r.jsonl"}, "num_workers": 2}
    with pytest.raises(
        BaseModelError,
        match=r"quant.kind=int8(.|\n)*% of its weights (.|\n)*8 bits are for linear(.|\n)*quant.kind=nf4",
    ):
        check_training(TrainSpec.model_validate({**given, "quant": "int8"}), config)
    sharded = {**given, "quant": "nf4", "strategy": {"kind": "fsdp2"}}
    with pytest.raises(BaseModelError, match=r"strategy.kind=fsdp2(.|\n)*packed experts are not sharded"):
        check_training(TrainSpec.model_validate(sharded), config)
    adapted = {**given, "quant": "none", "adapter": {"experts": True}, "strategy": {"kind": "zero3"}}
    with pytest.raises(BaseModelError, match=r"strategy.kind=zero3(.|\n)*whole weights(.|\n)*strategy.kind=zero2"):
        check_training(TrainSpec.model_validate(adapted), config)
    assert check_training(TrainSpec.model_validate({**given, "quant": "nf4"}), config).packed_experts


def test_a_lora_on_shared_experts_is_not_added_to_another_before_compute_is_spent() -> None:
    given = {"name": "t", "base": "b", "data": {"train": "r.jsonl"}, "base_adapter": "first@latest", "quant": "none"}
    spec = TrainSpec.model_validate(given)
    with pytest.raises(
        BaseModelError, match=r"base_adapter=first@latest(.|\n)*mlp.down_proj as one of a param(.|\n)*targets=attention"
    ):
        check_training(spec, config_of("deepseek_v3"))
    check_training(spec.with_({"adapter.targets": "attention"}), config_of("deepseek_v3"))
    check_training(spec, config_of("mixtral"))
