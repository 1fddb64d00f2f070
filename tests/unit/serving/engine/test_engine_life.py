"""The life of a request: its ends, its neighbours' ends, adapters that come and go, memory that runs out."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.serving.engine.engine import NativeEngine
from tests import engines

PROMPT = list(range(10, 60))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.write_lora(base, tmp_path_factory.mktemp("adapter"), 1, r=8, target_modules=list(engines.ALL))


@pytest.fixture
def engine(base: Path) -> Iterator[NativeEngine]:
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
    engine.start()
    yield engine
    engine.stop()


def test_log_probabilities_are_those_of_transformers(engine: NativeEngine, base: Path) -> None:
    answer = engines.ask(engine, engines.request("x", PROMPT, max_new_tokens=5, logprobs=0))[0]
    with torch.inference_mode():
        logits = engines.load_model(base)(torch.tensor([PROMPT + answer.tokens])).logits[0]
    expected = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1].gather(1, torch.tensor(answer.tokens)[:, None])
    assert torch.allclose(torch.tensor(answer.logprobs), expected[:, 0], atol=1e-5)


def test_the_end_of_a_request_frees_its_memory_and_that_of_an_adapter_its_prefixes(
    engine: NativeEngine, adapter: Path
) -> None:
    engine.load_adapter("v1", adapter)
    collector = engines.Collector()
    engine.submit(engines.request("long", PROMPT, "v1", max_new_tokens=200), collector)
    collector.next()
    engine.cancel("long")
    assert collector.wait("long")[0].finish == "cancelled"
    stats = engine.stats()
    assert (stats.running, stats.kv_tokens_used, stats.finished) == (0, 0, {"cancelled": 1})
    assert stats.prefix_tokens_cached == 48
    engine.retire_adapter("v1")
    base_only = engines.ask(engine, engines.request("after", PROMPT, max_new_tokens=3))  # lets the engine tidy up
    assert base_only[0].cached_tokens == 0
    assert engine.stats().prefix_tokens_cached == 48, "only the base's own prefix is left"


def test_a_row_whose_logits_are_not_finite_ends_alone(base: Path) -> None:
    """Token 9's embedding is inf: whoever reads it fails; neither its neighbours nor the next user of its KV do."""
    model = engines.load_model(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[9, 0] = float("inf")
        model.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(model.lm_head.weight.clone(), posinf=0.0))
    engine = NativeEngine(model, engines.spec(kv_tokens=1024), "cpu")
    engine.start()
    good = [engines.request(f"good{n}", [20 + n, 30, 40], max_new_tokens=8) for n in range(3)]
    expected = [answer.tokens for answer in engines.ask(engine, *good)]
    answers = engines.ask(engine, engines.request("bad", [9, 30, 40], max_new_tokens=8), *good)
    assert (answers[0].finish, answers[0].error) == ("error", "the model's logits are not finite")
    assert [answer.tokens for answer in answers[1:]] == expected
    assert [answer.tokens for answer in engines.ask(engine, *good)] == expected
    engine.stop()


def test_an_exception_in_the_model_fails_its_requests_and_the_engine_lives(base: Path) -> None:
    model = engines.load_model(base)
    engine = NativeEngine(model, engines.spec(), "cpu")
    engine.start()
    healthy = model.model.norm.forward

    def broken(*_: object) -> None:
        raise RuntimeError("a kernel failed")

    model.model.norm.forward = broken
    failed = engines.ask(engine, engines.request("x", PROMPT))[0]
    assert (failed.finish, failed.error) == ("error", "RuntimeError: a kernel failed")
    model.model.norm.forward = healthy
    assert engines.ask(engine, engines.request("x", PROMPT, max_new_tokens=4))[0].finish == "length"
    engine.stop()


def test_an_exception_of_the_tokenizer_fails_its_request_alone(base: Path) -> None:
    def broken(_: Sequence[int]) -> str:
        raise ValueError("no text for these ids")

    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu", broken)
    engine.start()
    good = engines.request("good", PROMPT, max_new_tokens=8)
    expected = engines.ask(engine, good)[0].tokens
    answers = engines.ask(engine, engines.request("bad", PROMPT, max_new_tokens=8, stop=("x",)), good)
    assert (answers[0].finish, answers[0].error) == ("error", "ValueError: no text for these ids")
    assert answers[1].tokens == expected
    assert engine.alive()
    assert (engine.stats().running, engine.stats().kv_tokens_used) == (0, 0)
    engine.stop()


def test_a_request_that_cannot_be_built_leaves_its_adapter_free(engine: NativeEngine, adapter: Path) -> None:
    """BLAKE2b takes no key above 64 bytes, and the salt is its key."""
    engine.load_adapter("v1", adapter)
    salted = replace(engines.request("x", PROMPT, "v1"), cache_salt="s" * 65)
    with pytest.raises(ValueError, match="64"):
        engine.submit(salted, engines.Collector())
    assert [state.running for state in engine.adapters()] == [0]
    engine.retire_adapter("v1")
    assert engine.adapters() == []


def test_a_second_stop_leaves_the_next_engine_of_the_model_alone(base: Path) -> None:
    model = engines.load_model(base)
    first = NativeEngine(model, engines.spec(), "cpu")
    first.start()
    asked = engines.request("x", PROMPT, max_new_tokens=8)
    expected = engines.ask(first, asked)[0].tokens
    first.stop()
    second = NativeEngine(model, engines.spec(), "cpu")
    second.start()
    first.stop()
    assert [(answer.tokens, answer.error) for answer in engines.ask(second, asked)] == [(expected, None)]
    second.stop()


def test_when_memory_runs_out_the_latest_step_back_and_answers_stay_right(base: Path) -> None:
    rng = random.Random(4)
    asked = [
        engines.request(
            f"r{n}", [rng.randrange(3, 500) for _ in range(30)], max_new_tokens=90, temperature=n % 2, seed=n
        )
        for n in range(8)
    ]
    expected: list[list[int]] = []
    for tokens, cache in ((8192, False), (512, False), (640, True)):
        changed = engines.spec(kv_tokens=tokens, max_seq_len=128, prefill_tokens=32, prefix_cache=cache)
        engine = NativeEngine(engines.load_model(base), changed, "cpu")
        engine.start()
        answers = [answer.tokens for answer in engines.ask(engine, *asked)]
        preemptions = engine.stats().preemptions
        engine.stop()
        expected = expected or answers
        assert (preemptions > 0) == (tokens < 8192)
        assert answers == expected


def test_more_adapters_than_slots_take_turns(base: Path, adapter: Path) -> None:
    """Five loaded versions, two slots: all answer, and the same as with a slot for each."""
    answers = []
    for slots in (8, 2):
        engine = NativeEngine(engines.load_model(base), engines.spec(max_loaded=slots), "cpu")
        for version in ("v1", "v2", "v3", "v4", "v5"):
            engine.load_adapter(version, adapter)
        engine.start()
        requests = [engines.request(f"{n}", PROMPT, f"v{n % 5 + 1}", max_new_tokens=4 + n) for n in range(10)]
        answers.append([answer.tokens for answer in engines.ask(engine, *requests)])
        assert engine.stats().most_adapters_in_step <= slots
        assert sum(state.in_slot for state in engine.adapters()) == min(slots, 5)
        assert {state.version for state in engine.adapters()} == {f"v{n}" for n in range(1, 6)}
        engine.stop()
    assert answers[0] == answers[1]


def test_first_come_first_served(base: Path) -> None:
    engine = NativeEngine(engines.load_model(base), engines.spec(max_batch=2), "cpu")
    collector = engines.Collector()
    for n in range(6):
        engine.submit(engines.request(f"r{n}", [5 + n, 6, 7], max_new_tokens=3), collector)
    engine.start()
    firsts: list[str] = []
    while len(firsts) < 6:
        name = collector.next().request_id
        firsts += [name] if name not in firsts else []
    assert firsts == [f"r{n}" for n in range(6)]
    engine.stop()


@pytest.mark.parametrize(
    ("changed", "asked"),
    [({"max_seq_len": 4096}, "engine.max_seq_len"), ({"kv_tokens": 128, "max_seq_len": 256}, "engine.kv_tokens")],
)
def test_limits_that_the_base_or_the_memory_cannot_hold_are_refused(
    base: Path, changed: dict[str, int], asked: str
) -> None:
    model = engines.load_model(base)
    with pytest.raises(ConfigError) as refused:
        NativeEngine(model, engines.spec(**changed), "cpu")
    assert refused.value.subject == asked
    assert model.config._attn_implementation == "sdpa"
