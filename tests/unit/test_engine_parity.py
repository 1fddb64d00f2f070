"""The engine says what PEFT says: tokens of a mixed batch in fp32, logits bit for bit on an nf4 base."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.serving.engine.engine import Engine
from tests import engines
from tests.tiny import VOCAB_SIZE, write_tiny_base

ADAPTERS: dict[str, dict[str, Any]] = {
    "a" * 12: {"r": 8, "lora_alpha": 16, "target_modules": list(engines.ALL)},
    "b" * 12: {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "c" * 12: {"r": 16, "lora_alpha": 16, "target_modules": list(engines.ATTENTION)},
    "d" * 12: {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "down_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 12},
        "alpha_pattern": {"k_proj": 20},
    },
}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: engines.write_lora(base, root / name, seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items(), 1)
    }


@pytest.fixture
def engine(base: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(engines.load_model(base), engines.spec(prefill_tokens=48), "cpu")
    for version, folder in adapters.items():
        engine.load_adapter(version, folder)
    engine.start()
    yield engine
    engine.stop()


def test_a_mixed_batch_answers_as_peft_does_one_by_one(base: Path, adapters: dict[str, Path], engine: Engine) -> None:
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(40)]
    prompts = [
        (shared if rng.random() < 0.5 else []) + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 90))]
        for _ in range(120)
    ]
    names = [None, *adapters]
    asked = [
        engines.request(f"r{n}", prompt, names[n % 5], max_new_tokens=NEW_TOKENS) for n, prompt in enumerate(prompts)
    ]
    collector = engines.Collector()
    for one in asked[:40]:
        engine.submit(one, collector)
    for one in asked[40:]:  # the others arrive while the first ones run
        collector.next()
        engine.submit(one, collector)
    answers = collector.wait(*(one.request_id for one in asked))
    assert {answer.error for answer in answers} == {None}
    for start, name in enumerate(names):
        expected = engines.peft_greedy(base, adapters[name] if name else None, prompts[start::5], NEW_TOKENS)
        assert [answer.tokens for answer in answers[start::5]] == expected, name
    assert engine.stats().prompt_tokens_from_cache > 0
    assert torch.tensor([len(set(answer.tokens)) for answer in answers]).float().mean() > 2, "the answers say something"
