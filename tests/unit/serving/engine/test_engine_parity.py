"""The engine says what PEFT says: tokens of a mixed batch in fp32, logits bit for bit on an nf4 base."""

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.model_runner import Runner
from tests import engines
from tests.tiny import VOCAB_SIZE

ADAPTERS: dict[str, dict[str, Any]] = {
    "a" * 12: {"r": 8, "lora_alpha": 16, "target_modules": list(engines.ALL)},
    "b" * 12: {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "c" * 12: {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
    "d" * 12: {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "down_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 12},
        "alpha_pattern": {"k_proj": 20},
    },
}
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: engines.write_lora(base, root / name, seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items(), 1)
    }


@pytest.fixture(scope="module", params=["kernels", "torch"])
def engine(base: Path, adapters: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[NativeEngine]:
    with engines.without_kernels() if request.param == "torch" else nullcontext():
        engine = NativeEngine(engines.load_model(base), engines.spec(prefill_tokens=48), "cpu")
    for version, folder in adapters.items():
        engine.load_adapter(version, folder)
    engine.start()
    yield engine
    engine.stop()


def test_a_mixed_batch_answers_as_peft_does_one_by_one(
    base: Path, adapters: dict[str, Path], engine: NativeEngine
) -> None:
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(40)]
    prompts = [
        (shared if rng.random() < 0.5 else []) + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 90))]
        for _ in range(110)
    ]
    names = [None, *adapters]
    asked = [
        engines.request(f"r{n}", prompt, names[n % 5], max_new_tokens=NEW_TOKENS) for n, prompt in enumerate(prompts)
    ]
    collector = engines.Collector()
    for one in asked[:30]:
        engine.submit(one, collector)
    for one in asked[30:]:  # the others arrive while the first ones run
        collector.next()
        engine.submit(one, collector)
    answers = collector.wait(*(one.request_id for one in asked))
    assert {answer.error for answer in answers} == {None}
    for start, name in enumerate(names):
        expected = engines.peft_greedy(base, adapters[name] if name else None, prompts[start::5], NEW_TOKENS)
        assert [answer.tokens for answer in answers[start::5]] == expected, name
    assert engine.stats().prompt_tokens_from_cache > 0
    varied = sum(len(set(answer.tokens)) > 2 for answer in answers)
    assert varied > 0.9 * len(answers), "a model that repeats itself would prove nothing"


def test_one_prompt_under_every_adapter_never_shares_its_prefix(
    base: Path, adapters: dict[str, Path], engine: NativeEngine
) -> None:
    prompt = [7 + n % 50 for n in range(100)]
    names = [None, *adapters]
    for turn in range(2):  # the second turn finds the prefix of each in the cache
        asked = [engines.request(f"p{turn}{n}", prompt, name, max_new_tokens=6) for n, name in enumerate(names)]
        answers = engines.ask(engine, *asked)
        for name, answer in zip(names, answers, strict=True):
            assert answer.tokens == engines.peft_greedy(base, adapters[name] if name else None, [prompt], 6)[0]
            assert answer.cached_tokens == (96 if turn else 0)


def test_many_adapters_of_mixed_ranks_decode_as_they_do_alone(base: Path, tmp_path: Path) -> None:
    """More adapters than the compact set starts with, ranks of two buckets, several rows each, sets that change."""
    engine = NativeEngine(engines.load_model(base), engines.spec(max_loaded=12, prefix_cache=False), "cpu")
    versions = [f"v{n}" for n in range(10)]
    for n, version in enumerate(versions):
        targets = engines.ALL if n % 3 else ("q_proj", "down_proj")
        folder = engines.write_lora(base, tmp_path / version, n, r=16 if n % 2 else 6, target_modules=list(targets))
        engine.load_adapter(version, folder)
    engine.start()
    rng = random.Random(1)
    asked = [
        engines.request(
            f"m{n}", [rng.randrange(3, 500) for _ in range(5 + n % 7)], version, max_new_tokens=4 + (5 * n) % 13
        )
        for n, version in enumerate([*versions, None, *versions[::2], *versions[3:5] * 3])
    ]
    together = engines.ask(engine, *asked)
    alone = [engines.ask(engine, one)[0] for one in asked]
    engine.stop()
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.finish for answer in together] == ["length"] * len(asked)


def test_adapters_saved_in_bf16_answer_as_pefts_do_in_half_the_memory(base: Path, tmp_path: Path) -> None:
    """Plain LoRA stays as its file was saved where the C kernels read it; DoRA is widened when it is read."""
    configs: dict[str, dict[str, Any]] = {
        "half": {"r": 16, "target_modules": "all-linear"},
        "few": {"r": 6, "target_modules": ["q_proj", "down_proj"]},
        "dora": {"r": 8, "target_modules": "all-linear", "use_dora": True},
    }
    folders = {name: engines.write_lora(base, tmp_path / name, 7, **config) for name, config in configs.items()}
    wide = engines.write_lora(base, tmp_path / "wide", 7, r=16, target_modules="all-linear")
    for folder in folders.values():
        narrow(folder / "adapter_model.safetensors")
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
    taken = {name: engine.load_adapter(name, folder) for name, folder in {**folders, "wide": wide}.items()}
    in_place = engine.runner.planner.reads_in_place
    assert taken["half"] == pytest.approx(taken["wide"] / (2 if in_place else 1), rel=0.01)
    engine.start()
    prompts = [[3 + (n * 7 + k * 11) % 400 for k in range(4 + n)] for n in range(9)]
    names = [*folders] * 3
    asked = [engines.request(f"b{n}", prompt, names[n], max_new_tokens=10) for n, prompt in enumerate(prompts)]
    answers = engines.ask(engine, *asked)
    engine.stop()
    for answer, name, prompt in zip(answers, names, prompts, strict=True):
        assert answer.tokens == engines.peft_greedy(base, folders[name], [prompt], 10)[0], name


def narrow(path: Path) -> None:
    """Rounds a file's LoRA halves to bf16."""
    halves = {key: value.to(torch.bfloat16) if "lora_" in key else value for key, value in load_file(path).items()}
    save_file({key: value.contiguous() for key, value in halves.items()}, path, metadata={"format": "pt"})


def peft_logits(model: Any, adapters: dict[str, Path], names: Sequence[str], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of one PEFT forward with an adapter name a row."""
    from peft import PeftModel

    first, *others = adapters
    peft = PeftModel.from_pretrained(model, adapters[first], adapter_name=first)
    for name in others:
        peft.load_adapter(adapters[name], adapter_name=name)
    with torch.inference_mode():
        logits: torch.Tensor = peft.eval()(input_ids=ids_BT, adapter_names=list(names)).logits
    return logits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_logits_on_a_quantised_base_equal_pefts_bit_for_bit(
    base: Path, adapters: dict[str, Path], engine: NativeEngine, kind: str
) -> None:
    ids_BT = torch.randint(3, VOCAB_SIZE, (10, 24), generator=torch.Generator().manual_seed(3))
    names = [name for name in ("__base__", *adapters) for _ in range(2)]
    runner = Runner(engines.load_quantized(base, kind, fused=True), "cpu")
    weights = [None if name == "__base__" else engine.pool.acquire(name) for name in names]
    ours = runner.logits(ids_BT, weights)
    runner.close()
    theirs = peft_logits(engines.load_quantized(base, kind, fused=True), adapters, names, ids_BT)
    assert torch.equal(ours, theirs)
    for one in weights:
        if one is not None:
            engine.pool.release(one.version)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_neighbours_do_not_change_a_row(base: Path, engine: NativeEngine, adapters: dict[str, Path], kind: str) -> None:
    """The base as an endpoint loads it; int8's usual outlier threshold of 6 would let the loud neighbour in."""
    resolved = base_model.resolve(BaseSpec(uri=str(base)))
    quant = QuantSpec.model_validate({"kind": kind, "dtype": "float32"})
    loaded = base_model.load(resolved, quant, device="cpu", purpose="serve")
    loaded.model.get_input_embeddings().weight[9] *= 100.0
    runner = Runner(loaded.model, "cpu")
    weights: list[LoadedAdapter | None] = [engine.pool.acquire(name) for name in adapters]
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(3, VOCAB_SIZE, (4, 24), generator=generator)
    others_BT = torch.randint(3, VOCAB_SIZE, (4, 24), generator=generator)
    others_BT[1], others_BT[2] = ids_BT[1], 9
    swapped = [weights[3], weights[1], weights[0], weights[2]]
    assert torch.equal(runner.logits(ids_BT, weights)[1], runner.logits(others_BT, swapped)[1])
    runner.close()
    for name in adapters:
        engine.pool.release(name)


def test_the_model_is_given_back_as_it_was(base: Path, adapters: dict[str, Path]) -> None:
    model = engines.load_model(base)
    ids = torch.tensor([[5, 6, 7, 8]])
    before, attention, names = model(ids).logits, model.config._attn_implementation, list(model.state_dict())
    engine = NativeEngine(model, engines.spec(), "cpu")
    engine.load_adapter("v1", adapters["a" * 12])
    engine.start()
    engines.ask(engine, engines.request("x", [5, 6, 7], "v1", max_new_tokens=3))
    engine.stop()
    assert torch.equal(model(ids).logits, before)
    assert (model.config._attn_implementation, list(model.state_dict())) == (attention, names)
