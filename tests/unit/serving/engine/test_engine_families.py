"""Other decoder families of transformers, tiny and random: greedy tokens equal `generate`'s, adapters on and off."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.errors import BaseModelError, ConfigError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.engine import NativeEngine
from tests import engines

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "phi3-longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
        "original_max_position_embeddings": 256,
    },
    "smollm3": {},
    "gemma": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2},
    "olmo2": {},
}


def write_family(folder: Path, kind: str, extra: dict[str, Any]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind.partition("-")[0], **SIZES, **extra)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_decodes_as_generate_does(kind: str, tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", kind, FAMILIES[kind])
    adapter = engines.write_lora(base, tmp_path / "adapter", 3, r=4, target_modules="all-linear")
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 300) for _ in range(length)] for length in (3, 20, 41, 60)]
    prompts += [prompts[-1][:50] + [7, 8, 9]]
    resolved = base_model.resolve(BaseSpec(uri=str(base)))
    plain = QuantSpec(kind="none", dtype="float32")
    model = base_model.load(resolved, plain, device="cpu", purpose="serve").model
    engine = NativeEngine(model, engines.spec(prefill_tokens=16), "cpu")
    engine.load_adapter("v1", adapter)
    engine.start()
    for name in (None, "v1"):
        asked = [engines.request(f"r{n}", prompt, name, max_new_tokens=12) for n, prompt in enumerate(prompts)]
        answers = [answer.tokens for answer in engines.ask(engine, *asked)]
        assert answers == engines.peft_greedy(base, adapter if name else None, prompts, 12)
    engine.stop()


def test_a_rope_that_would_let_a_long_row_change_its_neighbours_ends_before_that(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "phi3-longrope", FAMILIES["phi3-longrope"])
    with pytest.raises(ConfigError, match=r"max_seq_len: 257(.|\n)*beyond 256 tokens this base's longrope"):
        NativeEngine(engines.load_model(base), engines.spec(max_seq_len=257), "cpu")


def test_a_decoder_that_cannot_be_served_exactly_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    with pytest.raises(BaseModelError):
        NativeEngine(model, engines.spec(), "cpu")
