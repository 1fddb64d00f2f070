"""What every engine behind `Engine` does alike: ours, and vLLM's where it can run.

"stand-in" is our vLLM engine over tests/async_llm.py: threads, ids, refcounts and events are the real ones.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.errors import ArtifactError, DataError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine import Engine
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import TokenEvent
from graftwork.serving.spec import EngineSpec
from graftwork.serving.vllm.engine import Tally, VllmEngine, create_vllm
from tests import engines
from tests.async_llm import PlainWords, StandIn
from tests.tiny import VOCAB_SIZE

PROMPT = list(range(10, 50))
LIMITS: dict[str, Any] = {"max_batch": 16, "max_seq_len": 256, "kv_tokens": 8192, "prefill_tokens": 64}
Open = Callable[[], Engine]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two different adapters."""
    made = tmp_path_factory.mktemp("adapters")
    first, second = (
        engines.write_lora(base, made / str(seed), seed, r=8, target_modules=list(engines.ALL)) for seed in (1, 2)
    )
    return first, second


@pytest.fixture(params=["graftwork", "stand-in", pytest.param("vllm", marks=pytest.mark.gpu)])
def fresh(request: pytest.FixtureRequest, base: Path) -> Open:
    """Makes an engine that has not started."""
    if request.param == "vllm":
        if not torch.cuda.is_available() or find_spec("vllm") is None:
            pytest.skip("vLLM needs a CUDA device and the extra `vllm`")
        resolved, spec = base_model.resolve(BaseSpec(uri=str(base))), EngineSpec(kind="vllm", **LIMITS)
        return lambda: create_vllm(resolved, QuantSpec(kind="none"), spec)
    if request.param == "stand-in":
        tally = Tally(LIMITS["kv_tokens"])
        return lambda: VllmEngine(
            lambda: StandIn(base), PlainWords(), EngineSpec(kind="vllm", **LIMITS), vocab_size=VOCAB_SIZE, tally=tally
        )
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    spec = EngineSpec(**LIMITS, num_threads=1)
    return lambda: NativeEngine(engines.load_model(base), spec, "cpu", lambda ids: tokenizer.decode(list(ids)))


@pytest.fixture
def engine(fresh: Open) -> Iterator[Engine]:
    engine = fresh()
    engine.start()
    yield engine
    engine.stop()


def ask(engine: Engine, *requests: Any) -> list[engines.Answer]:
    collector = engines.Collector()
    for one in requests:
        engine.submit(one, collector)
    return collector.wait(*(one.request_id for one in requests))


def tokens(engine: Engine, adapter: str | None = None, name: str = "x", **sampling: Any) -> list[int]:
    return ask(engine, engines.request(name, PROMPT, adapter, **sampling))[0].tokens


def test_tokens_come_one_by_one_and_the_last_says_why(engine: Engine) -> None:
    collector = engines.Collector()
    engine.submit(engines.request("x", PROMPT, max_new_tokens=7), collector)
    events = [collector.next() for _ in range(7)]
    assert [event.finish_reason for event in events] == [None] * 6 + ["length"]
    assert all(0 <= event.token_id < VOCAB_SIZE and event.logprob is None for event in events)
    assert {event.request_id for event in events} == {"x"}


def test_answers_are_pefts_with_adapters_mixed(
    engine: Engine, base: Path, adapters: tuple[Path, Path], request: pytest.FixtureRequest
) -> None:
    """Source: peft and transformers, each adapter alone, greedy, fp32."""
    if "vllm" in request.node.callspec.params.values():
        pytest.skip("vLLM computes in 16 bit: its tokens are not those of fp32")
    for version, folder in zip(("a", "b"), adapters, strict=True):
        assert engine.load_adapter(version, folder) > 0
    versions = [None, "a", "b", "a", None]
    asked = [engines.request(f"r{n}", PROMPT[n:], version, max_new_tokens=12) for n, version in enumerate(versions)]
    folders = {None: None, "a": adapters[0], "b": adapters[1]}
    for n, answer in enumerate(ask(engine, *asked)):
        [expected] = engines.peft_greedy(base, folders[versions[n]], [PROMPT[n:]], 12)
        assert answer.tokens == expected


def test_stop_ids_and_stop_strings_end_an_answer(engine: Engine, base: Path) -> None:
    full = tokens(engine, max_new_tokens=12)
    stop = full[4]
    cut = ask(engine, engines.request("ids", PROMPT, stop_ids=frozenset({stop}), max_new_tokens=12))[0]
    assert (cut.tokens, cut.finish) == (full[: full.index(stop) + 1], "stop")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    text = tokenizer.decode(full)
    string = text[len(text) // 2 : len(text) // 2 + 4]
    cut = ask(engine, engines.request("string", PROMPT, stop=("never there", string), max_new_tokens=12))[0]
    assert cut.finish == "stop"
    assert string in tokenizer.decode(cut.tokens)
    assert string not in tokenizer.decode(cut.tokens[:-1])


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    collector = engines.Collector()
    engine.submit(engines.request("x", PROMPT, max_new_tokens=4, logprobs=3), collector)
    for event in (collector.next() for _ in range(4)):
        assert event.logprob is not None
        assert len(event.top) == 3
        assert event.top[0] == (event.token_id, event.logprob), "greedy: the chosen token is the most probable one"
        assert [value for _, value in event.top] == sorted((value for _, value in event.top), reverse=True)
        assert event.top[0][1] <= 0
    engine.submit(engines.request("y", PROMPT, max_new_tokens=1, logprobs=0), collector)
    event = collector.next()
    assert event.logprob is not None
    assert event.top == ()


def test_a_running_request_is_cancelled_and_others_go_on(engine: Engine) -> None:
    expected = tokens(engine, max_new_tokens=30)
    collector = engines.Collector()
    engine.submit(engines.request("long", PROMPT, max_new_tokens=200), collector)
    engine.submit(engines.request("other", PROMPT, max_new_tokens=30), collector)
    collector.next()
    engine.cancel("long")
    engine.cancel("long")
    engine.cancel("never submitted")
    long, other = collector.wait("long", "other")
    assert long.finish == "cancelled"
    assert len(long.tokens) < 200
    assert other.tokens == expected
    assert engine.stats().finished == {"length": 2, "cancelled": 1}
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_request_that_waits_can_be_cancelled(fresh: Open) -> None:
    engine = fresh()
    collector = engines.Collector()
    assert not engine.alive()
    engine.submit(engines.request("first", PROMPT, max_new_tokens=3), collector)
    engine.submit(engines.request("second", PROMPT, max_new_tokens=3), collector)
    engine.cancel("second")
    engine.start()
    first, second = collector.wait("first", "second")
    assert (len(first.tokens), first.finish) == (3, "length")
    assert (second.tokens, second.finish) == ([], "cancelled")
    engine.stop()


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"prompt": []}, "an empty prompt"),
        ({"prompt": [5, VOCAB_SIZE]}, f"token id {VOCAB_SIZE}"),
        ({"max_new_tokens": 250}, "max_new_tokens=250"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_a_bad_request_is_refused_at_the_door(engine: Engine, changed: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=found):
        engine.submit(engines.request("bad", **{"prompt": PROMPT, "max_new_tokens": 5, **changed}), engines.Collector())
    assert len(tokens(engine, name="bad", max_new_tokens=2)) == 2


def test_a_stopped_engine_refuses_requests_and_may_be_stopped_again(fresh: Open, adapters: tuple[Path, Path]) -> None:
    engine = fresh()
    engine.load_adapter("v", adapters[0])
    engine.start()
    engine.stop()
    engine.stop()
    with pytest.raises(DataError) as refused:
        engine.submit(engines.request("x", PROMPT, "v"), engines.Collector())
    found = refused.value
    assert (found.subject, found.problem) == ("request 'x'", "the engine is stopped")
    assert "ids" not in found.rule
    assert [state.running for state in engine.adapters()] == [0]


def test_an_id_in_use_and_an_unknown_adapter_are_refused(engine: Engine) -> None:
    collector = engines.Collector()
    engine.submit(engines.request("one", PROMPT, max_new_tokens=200), collector)
    with pytest.raises(DataError, match="in use"):
        engine.submit(engines.request("one", PROMPT), collector)
    with pytest.raises(ArtifactError, match="not loaded"):
        engine.submit(engines.request("two", PROMPT, "feedbeef"), collector)
    with pytest.raises(ArtifactError, match="not loaded"):
        engine.retire_adapter("feedbeef")
    engine.cancel("one")
    assert collector.wait("one")[0].finish == "cancelled"


def test_a_retired_version_serves_what_runs_and_is_then_gone(engine: Engine, adapters: tuple[Path, Path]) -> None:
    engine.load_adapter("v1", adapters[0])
    expected = tokens(engine, "v1", max_new_tokens=60)
    collector = engines.Collector()
    engine.submit(engines.request("running", PROMPT, "v1", max_new_tokens=60), collector)
    collector.next()
    engine.retire_adapter("v1")
    assert [(state.version, state.running, state.retired) for state in engine.adapters()] == [("v1", 1, True)]
    with pytest.raises(ArtifactError, match="retired"):
        engine.submit(engines.request("late", PROMPT, "v1"), collector)
    assert collector.wait("running")[0].tokens == expected
    assert engine.adapters() == []
    with pytest.raises(ArtifactError, match="not loaded"):
        engine.retire_adapter("v1")


def test_an_update_under_the_same_name_meets_nothing_of_the_old_one(
    engine: Engine, adapters: tuple[Path, Path]
) -> None:
    """The same name, the same prompt, other weights: neither old weights nor old keys and values are met."""
    engine.load_adapter("named", adapters[0])
    old = [tokens(engine, "named", max_new_tokens=10) for _ in range(2)]
    engine.load_adapter("witness", adapters[1])
    expected = tokens(engine, "witness", max_new_tokens=10)
    assert old[0] == old[1] != expected
    engine.retire_adapter("named")
    engine.load_adapter("named", adapters[1])
    answer = ask(engine, engines.request("after", PROMPT, "named", max_new_tokens=10))[0]
    assert (answer.tokens, answer.cached_tokens) == (expected, 0)


def test_a_repeated_prompt_is_answered_from_the_prefix_cache(engine: Engine, adapters: tuple[Path, Path]) -> None:
    engine.load_adapter("v1", adapters[0])
    asked = [engines.request(f"r{n}", PROMPT, version, max_new_tokens=5) for n, version in enumerate([None, "v1"] * 2)]
    base, tuned, base_again, tuned_again = (ask(engine, one)[0] for one in asked)
    assert base.cached_tokens == tuned.cached_tokens == 0, "an adapter's prompt is not the base's"
    assert base_again.cached_tokens == tuned_again.cached_tokens == 32
    assert (base_again.tokens, tuned_again.tokens) == (base.tokens, tuned.tokens)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.prompt_tokens_from_cache, stats.generated_tokens) == (160, 64, 20)


def test_a_prompt_of_another_salt_is_no_hit(engine: Engine) -> None:
    asked = [("ann", "a1"), ("bob", "b1"), ("", "c1"), ("bob", "b2"), ("ann", "a2")]
    answers = [
        ask(engine, replace(engines.request(name, PROMPT, max_new_tokens=5), cache_salt=salt))[0]
        for salt, name in asked
    ]
    assert [answer.cached_tokens for answer in answers] == [0, 0, 0, 32, 32]
    assert len({tuple(answer.tokens) for answer in answers}) == 1


def test_an_update_flips_new_requests_alone(engine: Engine, adapters: tuple[Path, Path]) -> None:
    engine.load_adapter("v1", adapters[0])
    engine.load_adapter("v2", adapters[1])
    expected = {version: tokens(engine, version, max_new_tokens=60) for version in ("v1", "v2")}
    collector = engines.Collector()
    engine.submit(engines.request("old", PROMPT, "v1", max_new_tokens=60), collector)
    collector.next()
    engine.retire_adapter("v1")
    engine.submit(engines.request("new", PROMPT, "v2", max_new_tokens=60), collector)
    old, new = collector.wait("old", "new")
    assert (old.tokens, new.tokens) == (expected["v1"], expected["v2"])
    assert [state.version for state in engine.adapters()] == ["v2"]


def test_a_retired_version_that_still_runs_is_taken_back(engine: Engine, adapters: tuple[Path, Path]) -> None:
    engine.load_adapter("v1", adapters[0])
    collector = engines.Collector()
    engine.submit(engines.request("running", PROMPT, "v1", max_new_tokens=100), collector)
    collector.next()
    engine.retire_adapter("v1")
    engine.load_adapter("v1", adapters[0])
    assert len(tokens(engine, "v1", name="more", max_new_tokens=3)) == 3
    engine.cancel("running")
    collector.wait("running")
    assert [(state.version, state.running, state.retired) for state in engine.adapters()] == [("v1", 0, False)]


def test_threads_that_load_one_version_at_once_share_it(engine: Engine, adapters: tuple[Path, Path]) -> None:
    collector, barrier = engines.Collector(), threading.Barrier(4)

    def load_and_ask(n: int) -> None:
        barrier.wait()
        engine.load_adapter("v1", adapters[0])
        engine.submit(engines.request(f"r{n}", PROMPT, "v1", max_new_tokens=5), collector)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_and_ask, range(4)))
    answers = collector.wait(*(f"r{n}" for n in range(4)))
    assert all(answer.tokens == answers[0].tokens and answer.error is None for answer in answers)
    assert [(state.version, state.running) for state in engine.adapters()] == [("v1", 0)]


def test_an_adapter_that_is_not_as_published_or_not_served_is_refused(
    engine: Engine, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="sha256"):
        engine.load_adapter("v1", adapters[0], {"adapter_model.safetensors": "0" * 64})
    strange = Path(shutil.copytree(adapters[0], tmp_path / "strange"))
    config = strange / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LOKR"'), encoding="utf-8")
    with pytest.raises(ArtifactError, match="LOKR"):
        engine.load_adapter("v1", strange)
    with pytest.raises(ArtifactError, match="LOKR"):
        engine.check_adapter(strange)
    assert engine.check_adapter(adapters[0]) > 0
    assert engine.adapters() == []


def test_a_reader_that_raises_ends_its_own_request_alone(engine: Engine) -> None:
    expected = tokens(engine, max_new_tokens=10)

    def broken(event: TokenEvent) -> None:
        raise ValueError("reader went away")

    collector = engines.Collector()
    engine.submit(engines.request("bad", PROMPT, max_new_tokens=100), broken)
    engine.submit(engines.request("good", PROMPT, max_new_tokens=10), collector)
    assert collector.wait("good")[0].tokens == expected
    assert engine.stats().finished == {"length": 2, "error": 1}


def test_stop_cancels_what_runs_and_refuses_what_comes(fresh: Open) -> None:
    engine = fresh()
    engine.start()
    collector = engines.Collector()
    engine.submit(engines.request("x", PROMPT, max_new_tokens=200), collector)
    collector.next()
    assert engine.alive()
    engine.stop()
    assert collector.wait("x")[0].finish == "cancelled"
    assert not engine.alive()
    with pytest.raises(DataError, match="stopped"):
        engine.submit(engines.request("y", [5]), collector)
    engine.cancel("x")


def test_a_given_continuation_is_scored_and_none_generated(
    engine: Engine, base: Path, adapters: tuple[Path, Path], request: pytest.FixtureRequest
) -> None:
    """Source: one whole forward pass of transformers, and of peft, fp32."""
    engine.load_adapter("a", adapters[0])
    ending = [7, 30, 7, 99]
    asked = [engines.scoring(f"s{n}", PROMPT[n:], ending, name) for n, name in enumerate([None, "a", "a"])]
    answers = ask(engine, *asked)
    assert [(answer.finish, answer.tokens) for answer in answers] == [("scored", [])] * 3
    exact = "vllm" not in request.node.callspec.params.values()  # vLLM computes in 16 bit
    for n, answer in enumerate(answers):
        expected = engines.peft_score(base, adapters[0] if n else None, PROMPT[n:], ending)
        assert answer.score == pytest.approx(expected, abs=1e-4 if exact else 0.5)
    assert engine.stats().finished == {"scored": 3}
    assert engine.stats().generated_tokens == 0
    with pytest.raises(DataError, match="prompt and continuation"):
        engine.submit(engines.scoring("long", range(3, 200), range(3, 70)), engines.Collector())
