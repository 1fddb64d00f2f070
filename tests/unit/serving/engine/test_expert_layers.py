"""Tiny mixture-of-experts bases: greedy tokens of a batch with base rows and adapters of experts equal PEFT's."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.adapters.lora import LoraSpec
from graftwork.artifacts.verify import problems, read_folder
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.errors import ArtifactError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.engine import NativeEngine
from tests import engines
from tests.families import write_family

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "gpt_oss")
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 4, "targets": "attention"},
    "experts": {"rank": 2, "targets": "mlp", "experts": True},
    "all": {"rank": 8, "alpha": 8, "rslora": True, "experts": True},
    "router": {"rank": 3, "targets": "attention", "router": True},
}
"""Different ranks, scales and targets; `all` has shared experts and dense blocks too."""


def write_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """As PEFT makes and saves them from the configs of the specs."""
    found = {}
    for seed, (name, keys) in enumerate(ADAPTERS.items()):
        config = LoraSpec(**keys).peft_config(engines.load_model(base))
        found[name] = engines.write_peft(base, folder / name, seed, config)
    return found


def started(base: Path, adapters: dict[str, Path], **keys: Any) -> NativeEngine:
    resolved = base_model.resolve(BaseSpec(uri=str(base)))
    plain = QuantSpec(kind="none", dtype="float32")
    model = base_model.load(resolved, plain, device="cpu", purpose="serve").model
    engine = NativeEngine(model, engines.spec(prefill_tokens=16, **keys), "cpu")
    for name, adapter in adapters.items():
        engine.load_adapter(name, adapter)
    engine.start()
    return engine


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_mixed_batch_decodes_as_peft_does(kind: str, tmp_path: Path) -> None:
    """Base rows and three adapters at once, prompts in chunks of 16 tokens."""
    base = write_family(tmp_path / "base", kind)
    adapters = write_adapters(base, tmp_path)
    for folder in adapters.values():
        assert list(problems(read_folder(folder))) == []
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 500) for _ in range(length)] for length in (3, 20, 41)]
    engine = started(base, adapters)
    names = (None, *adapters)
    asked = {
        (name, n): engines.request(f"{name}-{n}", prompt, name, max_new_tokens=12)
        for n, prompt in enumerate(prompts)
        for name in names
    }
    answers = dict(zip(asked, engines.ask(engine, *asked.values()), strict=True))
    engine.stop()
    expected = {name: engines.peft_greedy(base, adapters.get(name or ""), prompts, 12) for name in names}
    for (name, n), answer in answers.items():
        assert answer.tokens == expected[name][n], (name, n)
    different = {name: sum(expected[name][n] != expected[None][n] for n in range(3)) for name in adapters}
    assert all(different.values()), different  # each adapter changes what the base says


def test_many_tokens_of_one_adapter_go_expert_by_expert(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "qwen3_moe")
    adapter = write_adapters(base, tmp_path)["all"]
    prompt = [n % 490 + 3 for n in range(200)]
    engine = started(base, {"all": adapter})
    [answer] = engines.ask(engine, engines.request("r", prompt, "all", max_new_tokens=8))
    engine.stop()
    assert [answer.tokens] == engines.peft_greedy(base, adapter, [prompt], 8)


@pytest.mark.parametrize("kind", ["mixtral", "phimoe"])
def test_routers_alone_send_tokens_to_other_experts(kind: str, tmp_path: Path) -> None:
    """PhiMoE's router is a linear layer whose result is a tuple."""
    base = write_family(tmp_path / "base", kind)
    adapter = write_adapters(base, tmp_path)["router"]
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    routers = {name: 20 * tensor for name, tensor in tensors.items() if ".self_attn." not in name}
    assert routers
    save_file({name: routers.get(name, torch.zeros_like(tensor)) for name, tensor in tensors.items()}, path)
    prompts = [[n * k % 490 + 3 for n in range(30)] for k in (1, 7)]
    engine = started(base, {"v": adapter})
    names = (None, "v")
    asked = [engines.request(f"{n}{v}", prompt, v, max_new_tokens=8) for n, prompt in enumerate(prompts) for v in names]
    answers = [answer.tokens for answer in engines.ask(engine, *asked)]
    engine.stop()
    expected = [engines.peft_greedy(base, adapter if v else None, [prompt], 8)[0] for prompt in prompts for v in names]
    assert answers == expected
    assert expected[0] != expected[1]


def test_a_target_that_is_neither_experts_nor_a_linear_is_refused(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "mixtral")
    adapter = write_adapters(base, tmp_path)["experts"]
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_parameters"] = [*config["target_parameters"], "input_layernorm.weight"]
    path.write_text(json.dumps(config), encoding="utf-8")
    engine = started(base, {})
    with pytest.raises(ArtifactError, match="target_parameters=.*input_layernorm.weight"):
        engine.load_adapter("v", adapter)
    engine.stop()


def test_ranks_that_are_no_multiple_are_refused(tmp_path: Path) -> None:
    """The artifact check knows that PEFT stacks the ranks of experts: 4 experts of rank 2 are 8 lines, and no 3."""
    base = write_family(tmp_path / "base", "mixtral")
    adapter = write_adapters(base, tmp_path)["experts"]
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "r": 3}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="no multiple of rank 3"):
        read_folder(adapter)
