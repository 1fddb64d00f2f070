"""The life of a request: its ends, its neighbours' ends, adapters that come and go, memory that runs out."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from graftwork.errors import ArtifactError, ConfigError, DataError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import TokenEvent
from tests import engines
from tests.tiny import VOCAB_SIZE, write_tiny_base

PROMPT = list(range(10, 60))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.write_lora(base, tmp_path_factory.mktemp("adapter"), 1, r=8, target_modules=list(engines.ALL))


@pytest.fixture
def engine(base: Path) -> Iterator[NativeEngine]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu", lambda ids: tokenizer.decode(list(ids)))
    engine.start()
    yield engine
    engine.stop()


def test_an_answer_ends_at_max_new_tokens_or_with_a_stop_id(engine: NativeEngine) -> None:
    full = engines.ask(engine, engines.request("full", PROMPT, max_new_tokens=9))[0]
    assert (len(full.tokens), full.finish) == (9, "length")
    stop = full.tokens[4]
    cut = engines.ask(engine, engines.request("cut", PROMPT, stop_ids=frozenset({stop}), max_new_tokens=9))[0]
    assert (cut.tokens, cut.finish) == (full.tokens[: full.tokens.index(stop) + 1], "stop")


def test_a_stop_string_ends_the_answer_even_across_tokens(engine: NativeEngine, base: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    full = engines.ask(engine, engines.request("full", PROMPT, max_new_tokens=20))[0].tokens
    text = tokenizer.decode(full)
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = engines.ask(engine, engines.request("cut", PROMPT, max_new_tokens=20, stop=("never there", stop)))[0]
    assert cut.finish == "stop"
    assert stop in tokenizer.decode(cut.tokens)
    assert stop not in tokenizer.decode(cut.tokens[:-1])


def test_log_probabilities_are_the_models_own(engine: NativeEngine, base: Path) -> None:
    answer = engines.ask(engine, engines.request("x", PROMPT, max_new_tokens=5, logprobs=0))[0]
    with torch.inference_mode():
        logits = engines.load_model(base)(torch.tensor([PROMPT + answer.tokens])).logits[0]
    expected = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1].gather(1, torch.tensor(answer.tokens)[:, None])
    assert torch.allclose(torch.tensor(answer.logprobs), expected[:, 0], atol=1e-5)


def test_a_cancelled_request_ends_and_gives_its_memory_back(engine: NativeEngine) -> None:
    collector = engines.Collector()
    engine.submit(engines.request("long", PROMPT, max_new_tokens=200), collector)
    collector.next()
    engine.cancel("long")
    engine.cancel("never submitted")
    answer = collector.wait("long")[0]
    assert answer.finish == "cancelled"
    assert len(answer.tokens) < 200
    stats = engine.stats()
    assert (stats.running, stats.kv_tokens_used, stats.finished) == (0, 0, {"cancelled": 1})


def test_a_waiting_request_can_be_cancelled(base: Path) -> None:
    engine = NativeEngine(engines.load_model(base), engines.spec(max_batch=1), "cpu")
    engine.start()
    collector = engines.Collector()
    engine.submit(engines.request("first", PROMPT, max_new_tokens=200), collector)
    engine.submit(engines.request("second", PROMPT, max_new_tokens=200), collector)
    engine.cancel("second")
    assert collector.wait("second")[0].tokens == []
    engine.cancel("first")
    collector.wait("first")
    engine.stop()


def test_on_event_that_raises_ends_its_own_request_alone(engine: NativeEngine) -> None:
    expected = engines.ask(engine, engines.request("alone", PROMPT, max_new_tokens=10))[0].tokens

    def broken(event: TokenEvent) -> None:
        raise ValueError("reader went away")

    collector = engines.Collector()
    engine.submit(engines.request("bad", PROMPT, max_new_tokens=100), broken)
    engine.submit(engines.request("good", PROMPT, max_new_tokens=10), collector)
    assert collector.wait("good")[0].tokens == expected
    assert engine.stats().finished == {"length": 2, "error": 1}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"prompt": []}, "an empty prompt"),
        ({"prompt": [5, VOCAB_SIZE]}, f"token id {VOCAB_SIZE}"),
        ({"prompt": [-1]}, "token id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 250}, "max_new_tokens=250"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty=inf"),
        ({"presence_penalty": float("nan")}, "presence_penalty=nan"),
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, f"logit_bias: token id {VOCAB_SIZE}"),
        ({"logit_bias": ((3, float("nan")),)}, "logit_bias="),
        ({"stop_ids": frozenset({-1})}, "stop_ids: token id -1"),
        ({"min_new_tokens": 6}, "min_new_tokens=6"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"stop": ("",)}, "a stop string has at least one character"),
    ],
)
def test_a_bad_request_is_refused_at_the_door(engine: NativeEngine, changed: dict[str, object], found: str) -> None:
    settings = {"prompt": PROMPT, "max_new_tokens": 5, **changed}
    with pytest.raises(DataError, match=found):
        engine.submit(engines.request("bad", **settings), engines.Collector())  # type: ignore[arg-type]
    assert engines.ask(engine, engines.request("bad", PROMPT, max_new_tokens=2))[0].finish == "length"


def test_an_id_in_use_and_an_adapter_that_is_not_loaded_are_refused(engine: NativeEngine) -> None:
    collector = engines.Collector()
    engine.submit(engines.request("one", PROMPT, max_new_tokens=100), collector)
    with pytest.raises(DataError, match="in use"):
        engine.submit(engines.request("one", PROMPT), collector)
    with pytest.raises(ArtifactError, match="not loaded"):
        engine.submit(engines.request("two", PROMPT, "feedbeef"), collector)
    engine.cancel("one")


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


def test_a_retired_adapter_serves_its_running_requests_and_is_then_freed(engine: NativeEngine, adapter: Path) -> None:
    engine.load_adapter("v1", adapter)
    expected = engines.ask(engine, engines.request("before", PROMPT, "v1", max_new_tokens=40))[0].tokens
    collector = engines.Collector()
    engine.submit(engines.request("running", PROMPT, "v1", max_new_tokens=40), collector)
    collector.next()
    engine.retire_adapter("v1")
    assert [(state.version, state.running, state.retired) for state in engine.adapters()] == [("v1", 1, True)]
    with pytest.raises(ArtifactError, match="retired"):
        engine.submit(engines.request("late", PROMPT, "v1"), collector)
    assert collector.wait("running")[0].tokens == expected
    assert engine.adapters() == []
    with pytest.raises(ArtifactError, match="not loaded"):
        engine.retire_adapter("v1")
    base_only = engines.ask(engine, engines.request("after", PROMPT, max_new_tokens=3))  # lets the engine tidy up
    assert base_only[0].cached_tokens == 0
    assert engine.stats().prefix_tokens_cached == 48, "only the base's own prefix is left"


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


def test_threads_that_load_one_version_at_once_share_one_slot(base: Path, adapter: Path) -> None:
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
    engine.start()
    collector = engines.Collector()
    barrier = threading.Barrier(4)

    def load_and_ask(n: int) -> None:
        barrier.wait()
        engine.load_adapter("v1", adapter)
        engine.submit(engines.request(f"r{n}", PROMPT, "v1", max_new_tokens=5), collector)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_and_ask, range(4)))
    answers = collector.wait(*(f"r{n}" for n in range(4)))
    assert all(answer.tokens == answers[0].tokens and answer.error is None for answer in answers)
    assert [(state.version, state.running) for state in engine.adapters()] == [("v1", 0)]
    engine.stop()


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


def test_stop_cancels_what_runs_and_refuses_what_comes(base: Path) -> None:
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
    engine.start()
    collector = engines.Collector()
    engine.submit(engines.request("x", PROMPT, max_new_tokens=200), collector)
    collector.next()
    engine.stop()
    assert collector.wait("x")[0].finish == "cancelled"
    with pytest.raises(DataError, match="stopped"):
        engine.submit(engines.request("y", [5]), collector)


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
