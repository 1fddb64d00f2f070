"""DoRA, IA3, trained rows, prefixes and prompts beside LoRA and the base in one batch: each row says what PEFT says."""

import gc
import random
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)

from graftwork.artifacts import publish as artifact
from graftwork.errors import DataError
from graftwork.serving.engine.adapters.base_view import linear_weight
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import Store
from tests import engines
from tests.adapters import facts
from tests.tiny import VOCAB_SIZE
from tests.unit.serving.engine.test_engine_families import write_family

TASK = "CAUSAL_LM"
TRAINED = [3, 5, 8, 13, 21, 34, 55]
"""Prompts are drawn from ids below 60, so that they hold trained tokens."""
lora = partial(LoraConfig, task_type=TASK, r=4)
CONFIGS: dict[str, PeftConfig] = {
    "lora": lora(target_modules=list(engines.ALL)),
    "dora": lora(target_modules=list(engines.ALL), use_dora=True),
    "dora-some": lora(target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=True, lora_alpha=12),
    "ia3": IA3Config(
        task_type=TASK, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3-group": IA3Config(
        task_type=TASK, target_modules=["q_proj", "up_proj", "gate_proj"], feedforward_modules=["up_proj"]
    ),
    "rows": lora(target_modules=["q_proj"], trainable_token_indices=TRAINED),
    "only-rows": TrainableTokensConfig(task_type=TASK, token_indices=TRAINED),
    "embedding": lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "output": lora(target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True),
    "tied": lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "prefix": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=7),
    "projected": PrefixTuningConfig(
        task_type=TASK, num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=32
    ),
    "prompt": PromptTuningConfig(task_type=TASK, num_virtual_tokens=18),
    "p-tuning": PromptEncoderConfig(task_type=TASK, num_virtual_tokens=6, encoder_hidden_size=32),
}
Load = Callable[[Path], Any]


def write_all(base: Path, root: Path, kinds: list[str]) -> dict[str, Path]:
    return {
        kind: engines.write_peft(base, root / kind, seed, CONFIGS[kind])
        for seed, kind in enumerate(CONFIGS)
        if kind in kinds
    }


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(base, tmp_path_factory.mktemp("adapters"), list(CONFIGS))


def started(model: Any, adapters: dict[str, Path], **changed: Any) -> NativeEngine:
    engine = NativeEngine(model, engines.spec(max_loaded=32, **changed), "cpu")
    for version, folder in adapters.items():
        engine.load_adapter(version, folder)
    engine.start()
    return engine


def check_against_peft(
    engine: NativeEngine, base: Path, adapters: dict[str, Path], load: Load, each: int = 2, new_tokens: int = 8
) -> None:
    """Every adapter and the base answer `each` prompts, all in one batch; half of the prompts begin alike."""
    rng = random.Random(0)
    shared = [rng.randrange(3, 60) for _ in range(40)]
    names = [None, *adapters]
    prompts = {
        name: [shared[: 40 * (n % 2)] + [rng.randrange(3, 60) for _ in range(rng.randint(1, 40))] for n in range(each)]
        for name in names
    }
    asked = [
        engines.request(f"{name}/{n}", prompts[name][n], name, max_new_tokens=new_tokens)
        for n in range(each)
        for name in names
    ]
    answers = {one.request_id: answer for one, answer in zip(asked, engines.ask(engine, *asked), strict=True)}
    assert {answer.error for answer in answers.values()} == {None}
    plain = engines.peft_greedy(base, None, prompts[None], new_tokens, load)
    for name in names:
        folder = adapters[name] if name else None
        expected = engines.peft_greedy(base, folder, prompts[name], new_tokens, load) if folder else plain
        assert [answers[f"{name}/{n}"].tokens for n in range(each)] == expected, name
        if folder:
            own = engines.peft_greedy(base, None, prompts[name], new_tokens, load)
            assert expected != own, f"{name} that changes nothing proves nothing"


def test_a_mixed_batch_of_every_kind_answers_as_peft_does_one_by_one(base: Path, adapters: dict[str, Path]) -> None:
    engine = started(engines.load_model(base), adapters, max_batch=32)
    check_against_peft(engine, base, adapters, engines.load_model)
    assert engine.stats().most_adapters_in_step == len(adapters)
    engine.stop()


def test_answers_hold_in_chunks_from_the_prefix_cache_and_under_preemption(
    base: Path, adapters: dict[str, Path]
) -> None:
    """The engine with room for all computes each prompt at once; its answers are checked against PEFT's above."""
    some = {kind: adapters[kind] for kind in ("lora", "dora", "ia3", "rows", "projected", "prompt")}
    prompt = [7 + n % 50 for n in range(50)]
    asked = [
        engines.request(f"{kind}{n}", prompt[n * 20 :], kind, max_new_tokens=80) for n in range(2) for kind in some
    ]
    roomy = started(engines.load_model(base), some, prefix_cache=False)
    expected = [answer.tokens for answer in engines.ask(roomy, *asked)]
    roomy.stop()
    tight = started(engines.load_model(base), some, max_seq_len=160, kv_tokens=1024, prefill_tokens=16)
    assert [answer.tokens for answer in engines.ask(tight, *asked)] == expected
    assert tight.stats().preemptions > 0
    for kind, tokens in zip(some, expected, strict=False):
        for turn in range(2):
            answer = engines.ask(tight, engines.request(f"{turn}{kind}", prompt, kind, max_new_tokens=6))[0]
            assert answer.tokens == tokens[:6]
            lead = {"projected": 20, "prompt": 18}.get(kind, 0)
            if turn:
                assert answer.cached_tokens == (lead + 49) // 16 * 16 - lead, kind
    tight.stop()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_mixed_batch_on_a_quantised_base_answers_as_peft_does(
    base: Path, adapters: dict[str, Path], quant: str
) -> None:
    load = partial(engines.load_quantized, kind=quant)
    some = {kind: adapters[kind] for kind in ("lora", "dora", "ia3", "rows", "prefix")}
    engine = started(load(base), some)
    check_against_peft(engine, base, some, load, new_tokens=6)
    engine.stop()


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["dora", "dora-some", "ia3", "ia3-group"])
def test_prompt_logits_equal_pefts_bit_for_bit(base: Path, adapters: dict[str, Path], quant: str, kind: str) -> None:
    load: Load = engines.load_model if quant == "none" else partial(engines.load_quantized, kind=quant)
    ids_BT = torch.randint(3, VOCAB_SIZE, (3, 24), generator=torch.Generator().manual_seed(3))
    engine = NativeEngine(load(base), engines.spec(), "cpu")
    engine.load_adapter(kind, adapters[kind])
    ours = engine.runner.logits(ids_BT, [engine.pool.acquire(kind)] * 3)
    engine.stop()
    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(load(base), adapters[kind]).eval()(input_ids=ids_BT).logits
    assert torch.equal(ours, theirs)


def test_trained_rows_are_pefts_within_rounding(base: Path, adapters: dict[str, Path]) -> None:
    """Fewer rows in the product than peft's whole matrix: another order of sums, so 1e-4 and not bit for bit."""
    ids_BT = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(4))
    for kind in ("rows", "tied", "output"):
        engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
        engine.load_adapter(kind, adapters[kind])
        ours = engine.runner.logits(ids_BT, [engine.pool.acquire(kind)] * 2)
        engine.stop()
        with torch.inference_mode():
            theirs = PeftModel.from_pretrained(engines.load_model(base), adapters[kind]).eval()(input_ids=ids_BT).logits
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "ia3", "ia3-group", "rows", "embedding", "output", "tied"])
def test_in_bf16_no_kind_strays_further_from_fp32_than_peft_does(
    base: Path, adapters: dict[str, Path], kind: str
) -> None:
    ids_BT = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(6))
    engine = NativeEngine(engines.load_model(base).bfloat16(), engines.spec(), "cpu")
    engine.load_adapter(kind, adapters[kind])
    ours = engine.runner.logits(ids_BT, [engine.pool.acquire(kind)] * 4).float()
    engine.stop()
    exact, theirs = (
        PeftModel.from_pretrained(model, adapters[kind]).eval()
        for model in (engines.load_model(base), engines.load_model(base).bfloat16())
    )
    with torch.inference_mode():
        exact_BTV, theirs_BTV = exact(input_ids=ids_BT).logits, theirs(input_ids=ids_BT).logits.float()
    assert (ours - exact_BTV).square().mean() < 1.5 * (theirs_BTV - exact_BTV).square().mean()


@pytest.mark.parametrize(
    ("family", "extra", "kinds"),
    [
        ("qwen2", {}, ["dora", "ia3", "ia3-group", "embedding", "output", "rows"]),  # biases; not tied
        (
            "gemma3_text",
            {
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "full_attention"],
                "tie_word_embeddings": False,
            },
            ["dora", "rows", "embedding", "prompt"],
        ),  # scaled embeddings
    ],
)
def test_other_families_keep_their_biases_and_embedding_scales(
    family: str, extra: dict[str, Any], kinds: list[str], tmp_path: Path
) -> None:
    base = write_family(tmp_path / "base", family, extra)
    adapters = write_all(base, tmp_path, kinds)
    engine = started(engines.load_model(base), adapters)
    check_against_peft(engine, base, adapters, engines.load_model, new_tokens=6)
    engine.stop()


def test_sets_of_multiplied_channels_that_change_leave_every_row_right(base: Path, tmp_path: Path) -> None:
    """Several adapters with factors, several rows each, of which some end early and others arrive."""
    adapters = {}
    for n in range(6):
        config = CONFIGS["dora-some" if n % 2 else "ia3"]
        adapters[f"v{n}"] = engines.write_peft(base, tmp_path / f"v{n}", n, config)
    engine = started(engines.load_model(base), adapters, prefix_cache=False)
    rng = random.Random(1)
    asked = [
        engines.request(
            f"m{n}", [rng.randrange(3, 500) for _ in range(5 + n % 7)], version, max_new_tokens=4 + (5 * n) % 13
        )
        for n, version in enumerate([*adapters, None, "v1", "v1", "v2", None, "v5", *adapters])
    ]
    together = engines.ask(engine, *asked)
    alone = [engines.ask(engine, one)[0] for one in asked]
    engine.stop()
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


def test_a_retired_adapter_gives_its_tensors_back(base: Path, adapters: dict[str, Path]) -> None:
    some = {kind: adapters[kind] for kind in ("dora", "ia3", "rows", "prefix", "prompt")}
    engine = started(engines.load_model(base), some)
    asked = [engines.request(kind, [5, 6, 7, 8], kind, max_new_tokens=4) for kind in some]
    engines.ask(engine, *asked)
    sizes = {state.version: (state.rank, state.size_bytes) for state in engine.adapters()}
    assert sizes["ia3"] == (0, 2 * (32 + 32 + 128) * 4)
    assert sizes["prefix"] == (0, 7 * 2 * 2 * 32 * 4)
    held = []
    for kind in some:
        weights = engine.pool.acquire(kind)
        parts = [*weights.scales.values(), weights.inputs, weights.outputs, weights.virtual_tokens]
        held += [weakref.ref(part) for part in parts if part is not None]
        engine.pool.release(kind)
        engine.retire_adapter(kind)
    del weights, parts
    engines.ask(engine, engines.request("after", [5, 6, 7], max_new_tokens=1))  # the engine has seen what was freed
    gc.collect()
    assert len(held) > 10
    assert [one() for one in held if one() is not None] == []
    engine.stop()


def test_every_kind_is_published_and_served_from_what_was_published(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    engine = started(engines.load_model(base), {})
    for kind in ("dora", "ia3", "only-rows", "prefix", "prompt", "p-tuning"):
        manifest = artifact.publish(store, kind, adapters[kind], **facts())
        digests = {name: entry.sha256 for name, entry in manifest.files.items()}
        engine.load_adapter(manifest.version, artifact.fetch(store, kind, manifest.version), digests)
        engine.load_adapter(kind, adapters[kind])
        asked = [engines.request(one, [3, 5, 8, 9], one, max_new_tokens=5) for one in (manifest.version, kind)]
        published, own = engines.ask(engine, *asked)
        assert published.tokens == own.tokens
    engine.stop()


def test_virtual_tokens_count_towards_the_longest_sequence(base: Path, adapters: dict[str, Path]) -> None:
    engine = started(engines.load_model(base), {"projected": adapters["projected"]}, max_seq_len=64)
    assert (engine.max_request_tokens(None), engine.max_request_tokens("projected")) == (64, 44)
    engines.ask(engine, engines.request("fits", [5] * 34, "projected", max_new_tokens=10))
    with pytest.raises(DataError, match=r"20 virtual tokens(.|\n)*65 together(.|\n)*max_seq_len=64"):
        engine.submit(engines.request("long", [5] * 35, "projected", max_new_tokens=10), engines.Collector())
    assert [state.running for state in engine.adapters()] == [0]
    engine.stop()


def test_the_model_is_given_back_with_every_kind_of_hook_undone(base: Path, adapters: dict[str, Path]) -> None:
    model = engines.load_model(base)
    ids = torch.tensor([[3, 5, 8, 13]])
    before = model(ids).logits
    some = {kind: adapters[kind] for kind in ("ia3", "rows", "output")}
    engine = started(model, some)
    engines.ask(engine, *(engines.request(kind, [3, 5, 8], kind, max_new_tokens=2) for kind in some))
    engine.stop()
    assert torch.equal(model(ids).logits, before)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_packed_weight_is_read_as_it_multiplies(base: Path, quant: str) -> None:
    """Also where bitsandbytes has repacked it for its AVX512-BF16 kernel (bf16 scales then, so 1 part in 256)."""
    model = engines.load_quantized(base, quant)
    linear = model.model.layers[0].mlp.gate_proj
    for fused in (False, True):
        linear.support_avx512bf16_for_cpu = fused and linear.__class__.__name__ == "Linear4bit" and _has_fused()
        with torch.inference_mode():
            multiplied = linear(torch.eye(linear.in_features)).t()
        assert torch.allclose(linear_weight(linear), multiplied, rtol=1 / 128, atol=1e-3 if quant == "int8" else 1e-6)


def _has_fused() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())
