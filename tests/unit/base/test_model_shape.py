"""Sizes of bases against PyTorch's count of the real class, PEFT's of the real adapter, and published totals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftwork.adapters.bottleneck import BottleneckSpec
from graftwork.adapters.full import FullSpec
from graftwork.adapters.ia3 import Ia3Spec
from graftwork.adapters.lora import LoraSpec
from graftwork.adapters.prefix import PrefixSpec
from graftwork.adapters.spec import AdapterSpec
from graftwork.base.load import load, resolve
from graftwork.base.model_shape import ModelShape, facts_of
from graftwork.base.source import BaseSpec
from graftwork.errors import BaseModelError
from graftwork.planning.memory import weight_bytes
from graftwork.quantization import QuantSpec
from tests.families import FAMILIES, config_of, write_family

ADAPTERS: list[AdapterSpec] = [
    LoraSpec(rank=5),
    LoraSpec(rank=3, targets="attention", dora=True),
    LoraSpec(rank=3, targets="mlp"),
    FullSpec(),
    Ia3Spec(),
    PrefixSpec(tokens=4),
    BottleneckSpec(size=7),
    BottleneckSpec(size=7, placement="houlsby"),
]


QUICK = ("llama", "phi3", "gpt2", "gpt_neox", "starcoder2", "gemma4_text", "glm4_moe", "lfm2")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in FAMILIES]
)
def test_parameters_are_those_of_the_real_class_and_adapters_those_of_peft(kind: str) -> None:
    shape = ModelShape.from_config(config_of(kind))
    assert shape.params == sum(parameter.numel() for parameter in meta(kind).parameters())
    counted = 0
    for adapter in ADAPTERS:
        try:
            found = attached_params(kind, adapter)
        except Exception:  # PEFT has no such adapter for the family: what training refuses
            continue
        assert adapter.trained_params(shape) == found, adapter
        counted += 1
    assert counted >= 2


def meta(kind: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind]))


def attached_params(kind: str, adapter: AdapterSpec) -> int:
    """Trained values of the real adapter on the real class."""
    from graftwork.training.adapters.attach import attach

    model = attach(meta(kind).requires_grad_(False), adapter, begin=False)  # start values need real tensors
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "google/gemma-3-1b-it": (
        999_885_952,
        {
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 6912,
            "vocab_size": 262144,
        },
    ),
    "google/gemma-2-9b": (
        9_241_705_984,
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "intermediate_size": 14336,
            "vocab_size": 256000,
        },
    ),
    "EleutherAI/pythia-1b": (
        1_011_781_632,
        {
            "model_type": "gpt_neox",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 50304,
            "tie_word_embeddings": False,
        },
    ),
    "bigcode/starcoder2-3b": (
        3_030_371_328,
        {
            "model_type": "starcoder2",
            "hidden_size": 3072,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "intermediate_size": 12288,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "microsoft/phi-4": (
        14_659_507_200,
        {
            "model_type": "phi3",
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "intermediate_size": 17920,
            "vocab_size": 100352,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen/Qwen2.5-7B": (
        7_615_616_512,
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
    ),
    "openai-community/gpt2": (124_439_808, {"model_type": "gpt2"}),
    "mistralai/Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "num_local_experts": 8,
        },
    ),
    "deepseek-ai/DeepSeek-V3": (671_026_404_352, {"model_type": "deepseek_v3"}),
}


LARGE = ("google/gemma-2-9b", "Qwen/Qwen2.5-7B", "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/DeepSeek-V3")
"""A second to several: PEFT attaches an adapter to every layer and expert."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LARGE else name for name in PUBLISHED]
)
def test_published_totals_are_counted_at_full_size(name: str) -> None:
    total, config = PUBLISHED[name]
    assert ModelShape.from_config(config).params == total


def test_a_fused_layer_counts_once_in_a_lora() -> None:
    """Phi-4's qkv and gate_up are one linear each: 55.7 million values at r=16, where separate ones take 65.5."""
    assert ModelShape.from_config(PUBLISHED["microsoft/phi-4"][1]).adapter_params(16) == 55_705_600


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gemma3_text", "starcoder2"])
def test_weights_take_the_planned_bytes_when_they_are_loaded(kind: str, tmp_path: Path) -> None:
    base = resolve(BaseSpec(uri=str(write_family(tmp_path, kind))))
    shape = ModelShape.from_config(base.config)
    plain, packed = (QuantSpec(kind=quant, dtype="float32") for quant in ("none", "nf4"))
    assert weight_bytes(shape, plain) == load(base, plain, device="cpu", purpose="train").stored_bytes
    more = load(base, packed, device="cpu", purpose="train").stored_bytes - weight_bytes(shape, packed)
    assert 0 <= more <= 160 * sum(linear.count for linear in shape.linears), "bitsandbytes' table and settings a layer"


def test_a_known_base_is_planned_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    config = config_of("qwen3")
    facts_of(config)
    [entry] = (tmp_path / "shapes").iterdir()
    code = (
        "import json, sys\n"
        "from graftwork.base.support import base_support\n"
        "from graftwork.adapters.ia3 import Ia3Spec\n"
        "from graftwork.base.model_shape import ModelShape\n"
        f"config = json.loads({json.dumps(json.dumps(config))})\n"
        "print(Ia3Spec().trained_params(ModelShape.from_config(config)), base_support(config).format_line())\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[1] == "[]"
    assert "supports plan, none, int8, nf4, train LoRA, train full, packing, serve, serve adapters" in out
    assert [entry] == list((tmp_path / "shapes").iterdir()), "the second process counted again"


def test_an_entry_is_one_configs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    tied, untied = ({**config_of("qwen3"), "tie_word_embeddings": one} for one in (True, False))
    more = ModelShape.from_config(untied).params - ModelShape.from_config(tied).params
    assert more == 512 * 64
    assert len(list((tmp_path / "shapes").iterdir())) == 2


def test_a_class_that_is_no_causal_language_model_is_refused() -> None:
    config = {"model_type": "t5", "d_model": 64, "num_layers": 2, "vocab_size": 512}
    with pytest.raises(BaseModelError, match="cannot build it(.|\n)*Rule: (.|\n)*Hint: take a base"):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gemma3n_text", "equal sizes"), ("gpt2", "gelu_new"), ("lfm2", "recurrent")],
)
def test_activations_that_no_formula_covers_are_not_guessed(kind: str, reason: str) -> None:
    from graftwork.training.planning.memory import predict_training
    from graftwork.training.spec import TrainSpec

    spec = TrainSpec.model_validate({"name": "t", "base": "b", "data": {"train": "t.jsonl"}})
    with pytest.raises(BaseModelError, match=f"activations are not predicted for .*{reason}"):
        predict_training(spec, ModelShape.from_config(config_of(kind)))


@pytest.mark.parametrize(
    ("kind", "kept"), [("gemma2", (8, 8)), ("gpt_oss", (4, 2)), ("deepseek_v3", (4, 4)), ("llama", (0, 0))]
)
def test_scores_that_a_block_keeps_are_counted(kind: str, kept: tuple[float, float]) -> None:
    """Gemma-2: tanh, the softmax in fp32, its result in 16 bits. gpt-oss: the softmax. Latent attention: on a CPU."""
    shape = ModelShape.from_config(config_of(kind))
    assert shape.score_bytes == kept
    assert shape.on_gpu().keeps_scores == (kind in ("gemma2", "gpt_oss"))


def test_a_base_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    asked: list[str] = []

    def ask(*_: object) -> str:
        asked.append("")
        return "n"

    monkeypatch.setattr("builtins.input", ask)
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    with pytest.raises(BaseModelError, match="model_type='own'"):
        facts_of({"model_type": "own", "auto_map": code})
    known = facts_of({**config_of("llama"), "auto_map": code})
    assert (asked, known.model_class) == ([], "LlamaForCausalLM")
