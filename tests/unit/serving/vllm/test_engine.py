"""What our vLLM engine makes of specs, requests, adapters and outputs; on vLLM's own classes where it is installed."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftwork import config
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.errors import ArtifactError, ConfigError
from graftwork.planning.hardware import Accelerators, with_gpus
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.grammar import GrammarText
from graftwork.serving.engine.request import GenerateRequest, SamplingError, SamplingParams
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import EngineSpec, ServeSpec
from graftwork.serving.vllm.engine import Tally, VllmEngine, VllmTranslation, create_vllm
from graftwork.serving.vllm.translate import (
    Loras,
    Translator,
    check_adapter,
    engine_arguments,
    grammar_arguments,
    sampling_arguments,
)
from graftwork.stages.plans import plan_spec
from tests import engines
from tests.async_llm import Completion, Logprob, PlainWords, RequestOutput, StandIn
from tests.tiny import VOCAB_SIZE, write_tiny_base

VLLM = EngineSpec(kind="vllm")
NONE, NF4 = QuantSpec(kind="none"), QuantSpec(kind="nf4", double_quant=True)
HERE = find_spec("vllm") is not None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.write_lora(base, tmp_path_factory.mktemp("lora"), 1, r=8, target_modules=["q_proj"])


# Specs.


def test_engine_vllm_is_one_word_and_needs_its_gpus() -> None:
    spec = config.validate(ServeSpec, {"base": "b", "engine": "vllm", "num_gpus": 1}, "test")
    assert spec.engine == VLLM
    two = {"kind": "vllm", "tensor_parallel_size": 2}
    assert config.validate(ServeSpec, {"base": "b", "engine": two, "num_gpus": 2}, "test").num_gpus == 2
    for engine, gpus in (("vllm", 0), (two, 1)):
        with pytest.raises(ConfigError, match="needs num_gpus="):
            config.validate(ServeSpec, {"base": "b", "engine": engine, "num_gpus": gpus}, "test")
    tree = {"name": "c", "base": "b", "eval": "e", "answer_schema": "s", "arms": [{"name": "a"}, {"name": "b"}]}
    with pytest.raises(ConfigError, match="needs num_gpus=1"):
        config.validate(CompareSpec, {**tree, "baseline": "a", "engine": "vllm", "num_gpus": 0}, "test")
    compare = config.validate(CompareSpec, {**tree, "baseline": "a", "engine": "vllm"}, "test")
    assert with_gpus(compare, Accelerators(0))[0].num_gpus == 1, "auto"
    with pytest.raises(ConfigError, match="measured on engine.kind='graftwork'"):
        config.validate(QuantizeSpec, {**tree, "engine": "vllm"}, "test")


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        ({"tensor_parallel_size": 2}, "engine.tensor_parallel_size"),
        ({"gpu_memory_utilization": 0.5}, "engine.gpu_memory_utilization"),
        ({"kind": "vllm", "num_threads": 2}, "engine.num_threads"),
    ],
)
def test_a_setting_of_the_other_engine_is_refused(engine: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} cannot take effect"):
        config.validate(EngineSpec, engine, "test")


def test_the_spec_in_vllms_words() -> None:
    spec = EngineSpec(
        kind="vllm",
        tensor_parallel_size=2,
        max_batch=32,
        max_seq_len=512,
        kv_tokens=1000,
        max_rank=24,
        prefill_tokens=256,
        max_loaded=64,
        prefix_cache=False,
    )
    found = engine_arguments(Path("/base"), spec, NF4)
    assert (found["model"], found["tokenizer"], found["tensor_parallel_size"]) == ("/base", "/base", 2)
    assert (found["max_num_seqs"], found["max_num_batched_tokens"], found["max_model_len"]) == (32, 288, 512)
    assert found["num_gpu_blocks_override"] * found["block_size"] == 1008, "whole blocks"
    assert (found["enable_lora"], found["max_loras"], found["max_lora_rank"]) == (True, 32, 32)
    assert found["enable_prefix_caching"] is False
    assert (found["quantization"], found["load_format"]) == ("bitsandbytes", "bitsandbytes")
    assert found["dtype"] == "bfloat16"
    plain = engine_arguments(Path("/base"), spec, QuantSpec(kind="none", dtype="float32"))
    assert "quantization" not in plain
    assert plain["dtype"] == "float32"


@pytest.mark.parametrize(
    ("spec", "quant", "asked"),
    [
        (VLLM, QuantSpec(kind="int8"), "quant.kind=int8"),
        (VLLM, QuantSpec(kind="nf4"), "quant.double_quant=false"),
        (VLLM, QuantSpec(kind="nf4", double_quant=True, resident="dequantised"), "quant.resident=dequantised"),
        (EngineSpec(kind="vllm", max_rank=1024), NONE, "engine.max_rank=1024"),
    ],
)
def test_weights_that_vllm_would_hold_otherwise_are_refused(spec: EngineSpec, quant: QuantSpec, asked: str) -> None:
    with pytest.raises(ConfigError) as refused:
        engine_arguments(Path("/base"), spec, quant)
    assert refused.value.subject == asked


def test_a_plan_says_that_it_does_not_know_vllm() -> None:
    spec = config.validate(ServeSpec, {"base": "b", "engine": "vllm", "num_gpus": 1}, "test")
    with pytest.raises(ConfigError, match="predicted for our own engine"):
        plan_spec(spec, Path())


@pytest.mark.skipif(HERE, reason="vLLM is installed")
def test_without_vllm_its_extra_is_named(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)package vllm is not installed.*pip install 'vllm==0\.29\.0'"):
        create_vllm(base_model.resolve(BaseSpec(uri=str(base))), NONE, VLLM)


# Requests.


def request(grammar: Any = None, **sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", (1, 2), SamplingParams(**sampling), frozenset({9, 4}), None, grammar)


def test_every_sampling_parameter_is_mapped() -> None:
    wanted: dict[str, Any] = {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "stop": ("END",),
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "logit_bias": ((8, 1.5),),
        "logprobs": 2,
    }
    mapped = sampling_arguments(request(**wanted))
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    assert {names.get(field.name, field.name) for field in fields(SamplingParams)} <= set(mapped)
    assert mapped["max_tokens"] == 7
    assert mapped["logit_bias"] == {8: 1.5}
    assert mapped["stop"] == ["END"]
    for key in ("temperature", "top_p", "top_k", "seed", "repetition_penalty", "logprobs"):
        assert mapped[key] == wanted[key]
    assert (mapped["stop_token_ids"], mapped["ignore_eos"]) == ([4, 9], True), "only the request's ids end it"
    assert sampling_arguments(request(min_p=0.1, temperature=1.0))["min_p"] == 0.1
    assert sampling_arguments(request(min_new_tokens=3))["min_tokens"] == 3


@pytest.mark.parametrize(
    ("sampling", "key"),
    [
        ({"temperature": 0.001}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"min_p": 0.1, "top_p": 0.9, "temperature": 1.0}, "min_p"),
        ({"stop": ("x",), "min_new_tokens": 4}, "min_new_tokens"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_vllm_would_do_otherwise_is_refused_by_name(sampling: dict[str, Any], key: str) -> None:
    with pytest.raises(SamplingError, match=f"^SamplingError: {key}="):
        sampling_arguments(request(**sampling))


def test_a_grammar_goes_as_it_was_written() -> None:
    schema = json.dumps({"type": "object"})
    for kind, text, key in (("json_schema", schema, "json"), ("regex", "a+", "regex")):
        asked = request(SimpleNamespace(text=GrammarText(kind, text)))  # type: ignore[arg-type]
        assert grammar_arguments(asked) == {key: text}
        assert sampling_arguments(asked)["ignore_eos"] is False, "a finished grammar allows nothing but the end"
    assert grammar_arguments(request()) is None


@pytest.mark.skipif(not HERE, reason="vLLM (extra `vllm`) is not installed")
def test_vllm_takes_what_we_give_it(adapter: Path) -> None:
    from vllm.sampling_params import RequestOutputKind

    words = VllmTranslation()
    made = words.sampling(sampling_arguments(request(stop=("END",), temperature=0.5, logprobs=2)), {"regex": "a+"})
    assert (made.output_kind, made.stop, made.temperature, made.structured_outputs.regex) == (
        RequestOutputKind.DELTA,
        ["END"],
        0.5,
        "a+",
    )
    lora = words.lora(Loras().new("v1", adapter, 8, 100))
    assert (lora.lora_name, lora.lora_int_id, lora.lora_path, lora.load_inplace) == ("v1#1", 1, str(adapter), False)
    assert words.prompt((1, 2), "")["prompt_token_ids"] == [1, 2]


# Outputs.


def delta(ids: list[int], reason: str | None = None, logprobs: Any = None, cached: int | None = 32) -> RequestOutput:
    return RequestOutput([Completion(ids, logprobs, reason)], None, cached)


def test_a_delta_of_several_tokens_is_an_event_each() -> None:
    translator = Translator("r", 0)
    first = translator.events(delta([5, 6]))
    assert [(event.token_id, event.finish_reason, event.cached_tokens) for event in first] == [
        (5, None, 32),
        (6, None, 0),
    ]
    last = translator.events(delta([7, 8], "stop"))
    assert [(event.token_id, event.finish_reason) for event in last] == [(7, None), (8, "stop")]


@pytest.mark.parametrize(
    ("told", "reason", "error"),
    [
        ("abort", "cancelled", None),
        ("error", "error", "vLLM ended it with finish_reason=error"),
        ("repetition", "error", "vLLM ended it with finish_reason=repetition"),
        ("length", "length", None),
    ],
)
def test_an_end_without_a_token_is_one_event(told: str, reason: str, error: str | None) -> None:
    [event] = Translator("r", 0).events(delta([], told))
    assert (event.token_id, event.finish_reason, event.error) == (-1, reason, error)


def test_the_chosen_token_outside_the_best_is_told_beside_them() -> None:
    place = {3: Logprob(-0.1, 1), 4: Logprob(-2.0, 2), 7: Logprob(-5.0, 40)}
    [event] = Translator("r", 2).events(delta([7], None, [place]))
    assert (event.logprob, event.top) == (-5.0, ((3, -0.1), (4, -2.0)))


# Adapters.


def test_an_id_and_a_name_are_never_used_twice(adapter: Path) -> None:
    loras = Loras()
    seen = set()
    for version in ("v1", "v2", "v1", "v1"):
        lora = loras.new(version, adapter, 8, 100)
        loras.add(lora)
        assert loras.retire(version) is lora
        seen.add((lora.name, lora.number))
    assert len({name for name, _ in seen}) == len({number for _, number in seen}) == 4
    assert all(number >= 1 for _, number in seen)


def test_a_version_goes_with_its_last_holder(adapter: Path) -> None:
    loras = Loras()
    loras.add(loras.new("v1", adapter, 8, 100))
    held = [loras.acquire("v1"), loras.acquire("v1")]
    assert loras.retire("v1") is None
    assert loras.release(held[0]) is None
    assert loras.release(held[1]) is held[1]
    with pytest.raises(ArtifactError, match="not loaded"):
        loras.acquire("v1")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern="),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 128}, "r=128"),
        ({"something_new": 1}, "something_new=1"),
    ],
)
def test_an_adapter_that_vllm_would_misread_is_refused(
    adapter: Path, tmp_path: Path, changed: dict[str, Any], found: str
) -> None:
    assert check_adapter(adapter, None, max_rank=64).rank == 8
    folder = Path(shutil.copytree(adapter, tmp_path / "copy"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changed}), encoding="utf-8")
    with pytest.raises(ArtifactError) as refused:
        check_adapter(folder, None, max_rank=64)
    assert refused.value.problem.startswith(found)


# The engine's own life.


@pytest.fixture
def running(base: Path) -> Iterator[tuple[VllmEngine, StandIn]]:
    llm = StandIn(base)
    engine = VllmEngine(lambda: llm, PlainWords(), VLLM, vocab_size=VOCAB_SIZE, tally=Tally(1000))
    engine.start()
    yield engine, llm
    engine.stop()


def test_vllm_lets_an_adapter_go_only_when_nobody_needs_it(running: tuple[VllmEngine, StandIn], adapter: Path) -> None:
    engine, llm = running
    engine.load_adapter("v1", adapter)
    collector = engines.Collector()
    engine.submit(engines.request("x", [5, 6], "v1", max_new_tokens=100), collector)
    collector.next()
    engine.retire_adapter("v1")
    engine.load_adapter("v2", adapter)
    assert llm.lora_ids == {1, 2}, "v1 still runs"
    engine.cancel("x")
    collector.wait("x")
    engine.load_adapter("v3", adapter)  # its turn on the loop comes after the removal
    assert llm.lora_ids == {2, 3}
    assert llm.aborted == ["x"]


def test_vllm_that_dies_fails_its_requests_and_is_not_alive(running: tuple[VllmEngine, StandIn]) -> None:
    engine, llm = running

    async def dies(*_: Any, **__: Any) -> Any:
        raise RuntimeError("EngineCore encountered an issue")
        yield

    llm.generate, llm.errored = dies, True  # type: ignore[method-assign]
    collector = engines.Collector()
    engine.submit(engines.request("x", [5, 6]), collector)
    [answer] = collector.wait("x")
    assert (answer.finish, answer.error) == ("error", "RuntimeError: EngineCore encountered an issue")
    assert not engine.alive()
    assert engine.stats().finished == {"error": 1}


def test_an_adapter_that_vllm_cannot_load_is_told_and_not_kept(
    running: tuple[VllmEngine, StandIn], adapter: Path
) -> None:
    engine, llm = running

    async def fails(_: object) -> bool:
        await asyncio.sleep(0)
        raise Exception("Call to add_lora method failed: no room")  # as vLLM's core client raises it

    llm.add_lora = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(ArtifactError, match="no room"):
        engine.load_adapter("v1", adapter)
    assert engine.adapters() == []


def test_an_engine_that_cannot_be_made_leaves_no_thread(base: Path) -> None:
    import threading

    def broken() -> StandIn:
        raise RuntimeError("Engine core initialization failed")

    with pytest.raises(RuntimeError, match="initialization failed"):
        VllmEngine(broken, PlainWords(), VLLM, vocab_size=VOCAB_SIZE, tally=Tally(1000))
    assert "vllm-engine" not in {thread.name for thread in threading.enumerate()}


def test_what_vllm_tells_of_its_steps_is_in_the_stats() -> None:
    tally = Tally(1000)
    scheduler = SimpleNamespace(
        num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.25, running_lora_adapters={"a#1": 2, "b#2": 1}
    )
    tally.record(scheduler, SimpleNamespace(num_preempted_reqs=1))
    tally.record(None, SimpleNamespace(num_preempted_reqs=1))
    stats = tally.stats(live=5)
    assert (stats.running, stats.waiting, stats.kv_tokens_used, stats.kv_tokens_limit) == (3, 2, 250, 1000)
    assert (stats.steps, stats.preemptions, stats.most_adapters_in_step) == (2, 2, 2)
    assert tally.stats(live=0).kv_tokens_used == 0
