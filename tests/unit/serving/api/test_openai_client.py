"""The official openai client against our app: the real app and a real replica in this process, no socket between."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from graftwork.prompts.render import Message, render
from graftwork.prompts.template import Template
from graftwork.serving.api.app import make_app
from graftwork.serving.api.auth import Keys
from graftwork.serving.live_config import LiveConfig
from graftwork.serving.replica import EngineReplica
from graftwork.serving.spec import ServeSpec
from tests import engines
from tests.local_endpoint import LocalBackend
from tests.tiny import write_tiny_base

HELLO: list[Any] = [{"role": "user", "content": "Hello, which airport has the ICAO code ZPPP?"}]
DRAWN: dict[str, Any] = {"messages": HELLO, "max_tokens": 12, "temperature": 1.0, "seed": 4}


class World:
    """A loop of its own, so that one replica serves every test of this file."""

    def __init__(self, base: Path, root: Path) -> None:
        self.base, self.model = base, base.name
        spec = ServeSpec.model_validate(
            {
                "base": str(base),
                "root": str(root),
                "quant": {"kind": "none", "dtype": "float32"},
                "engine": {"max_seq_len": 400},
                "arms": [{"name": "code", "grammar": {"regex": "[A-Z]{4}"}}],
            }
        )
        self._runner = asyncio.Runner()
        self._replica = EngineReplica.__new__(EngineReplica)
        self._runner.run(self._replica.__init__(spec.model_dump(mode="json")))  # type: ignore[misc]
        backend = LocalBackend(self._replica)
        self._app = make_app(LiveConfig(spec, backend), backend, Keys())

    def play(self, act: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
        """Runs `act` with a client."""

        async def run() -> Any:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport) as http:
                client = AsyncOpenAI(api_key="x", base_url="http://127.0.0.1/v1", http_client=http, max_retries=0)
                return await act(client)

        return self._runner.run(run())

    def stats(self) -> Any:
        """The engine's counters."""
        return asdict(self._runner.run(self._replica.snapshot()).engine)

    def close(self) -> None:
        """Ends the engine."""
        self._replica.stop()
        self._runner.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(write_tiny_base(tmp_path_factory.mktemp("base") / "tiny"), tmp_path_factory.mktemp("root"))
    yield world
    world.close()


def chat(world: World, **asked: Any) -> Any:
    return world.play(lambda client: client.chat.completions.create(model=asked.pop("model", world.model), **asked))


def refused(world: World, **asked: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(world, **{**DRAWN, **asked})
    return caught.value


def test_logprobs_are_the_models_own_and_spell_the_answer(world: World) -> None:
    got = chat(world, messages=HELLO, max_tokens=8, logprobs=True, top_logprobs=3)
    told = got.choices[0].logprobs.content
    template = Template.load(world.base)
    prompt = list(render([Message("user", HELLO[0]["content"])], template, generate=True).ids)
    answer: list[int] = []
    with torch.inference_mode():
        model = engines.load_model(world.base)
        for _ in range(8):
            logprobs_V = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0, -1], -1)
            one = told[len(answer)]
            best = logprobs_V.topk(3)
            assert one.logprob == pytest.approx(float(best.values[0]), abs=1e-4)
            assert [other.logprob for other in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert (one.token, one.bytes) == (one.top_logprobs[0].token, one.top_logprobs[0].bytes)
            answer.append(int(best.indices[0]))
    assert b"".join(bytes(one.bytes) for one in told).decode("utf-8", "replace") == got.choices[0].message.content
    assert got.choices[0].message.content == template.decode(answer)


def test_text_completions_tell_logprobs_in_their_own_shape(world: World) -> None:
    async def act(client: AsyncOpenAI) -> Any:
        body = {"regex": "[a-z ,]{40,80}"}  # letters: a random model says bytes that are no text
        return await client.completions.create(
            model=world.model, prompt="The airport", max_tokens=6, logprobs=2, extra_body=body
        )

    choice = world.play(act).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    for at, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert choice.text[at:].startswith(token)
    for logprob, top, token in zip(
        choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, choice.logprobs.tokens, strict=True
    ):
        assert top[token] == logprob
        assert len(top) in (2, 3)  # the chosen one may be among the two best, before the grammar's cut


def test_several_choices_share_the_prompt_and_differ_by_their_seeds(world: World) -> None:
    before = world.stats()
    several = chat(world, **DRAWN, n=4)
    after = world.stats()
    one = chat(world, **DRAWN)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert texts[0] == one.choices[0].message.content
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in chat(world, **DRAWN, n=4).choices] == texts
    assert several.usage.prompt_tokens == one.usage.prompt_tokens
    assert several.usage.completion_tokens == after["generated_tokens"] - before["generated_tokens"] == 48
    shared = one.usage.prompt_tokens // 16 * 16  # whole blocks of the prefix cache, for three of the four
    assert after["prompt_tokens_from_cache"] - before["prompt_tokens_from_cache"] >= 3 * shared


@pytest.mark.parametrize("stop", [None, "a"])
def test_a_stream_of_several_choices_adds_up_to_the_whole(world: World, stop: str | None) -> None:
    asked: dict[str, Any] = {**DRAWN, "model": world.model, "n": 3, "logprobs": True, "top_logprobs": 1, "stop": stop}

    async def act(client: AsyncOpenAI) -> Any:
        whole = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = world.play(act)
    texts, told, ends = [""] * 3, [list[Any]() for _ in range(3)], {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            told[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert told == [choice.logprobs.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    if stop:
        for choice in whole.choices:
            spelled = b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode("utf-8", "replace")
            assert stop not in choice.message.content
            assert spelled.startswith(choice.message.content)


def test_a_pydantic_model_comes_back_parsed(world: World) -> None:
    class Airport(BaseModel):
        icao: str = Field(pattern="^[A-Z]{4}$")
        kind: Literal["land", "sea"]
        runways: list[int] = Field(max_length=2)

    async def act(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.parse(
            model=world.model, messages=HELLO, response_format=Airport, max_tokens=200, temperature=1.0, seed=3, n=2
        )

    got = world.play(act)
    for choice in got.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Airport)
    assert got.choices[0].message.content != got.choices[1].message.content


def test_regex_and_an_arms_own_grammar(world: World) -> None:
    got = chat(world, **DRAWN, extra_body={"regex": "(yes|no), [0-9]{2}"})
    assert re.fullmatch("(yes|no), [0-9]{2}", got.choices[0].message.content)
    code = chat(world, messages=HELLO, model="arm/code")
    assert re.fullmatch("[A-Z]{4}", code.choices[0].message.content)
    error = refused(world, model="arm/code", extra_body={"regex": "x"})
    assert (error.param, "own grammar" in error.message) == ("regex", True)


def test_extensions_take_effect(world: World) -> None:
    template = Template.load(world.base)
    letters = {str(token): -100.0 for token in range(3, 512) if not template.decode([token]).isascii()}
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 12, "logit_bias": letters}
    free = chat(world, **asked, logprobs=True).choices[0]
    third = free.logprobs.content[2]
    ids = template.encode(third.token)
    assert len(ids) == 1
    body = {"stop_token_ids": ids}
    cut = chat(world, **asked, extra_body=body, logprobs=True).choices[0]
    first = [one.token for one in free.logprobs.content].index(third.token)
    assert cut.finish_reason == "stop"
    assert [one.token for one in cut.logprobs.content] == [one.token for one in free.logprobs.content[:first]]
    assert cut.message.content == "".join(one.token for one in cut.logprobs.content)
    longer = chat(world, **asked, extra_body={**body, "min_tokens": 12})
    assert (longer.choices[0].finish_reason, longer.usage.completion_tokens) == ("length", 12)
    forced = chat(world, messages=HELLO, max_tokens=1, logit_bias={str(ids[0]): 100})
    assert forced.choices[0].message.content == third.token


def test_ignored_ends_leave_no_trace_in_the_text_but_are_told(world: World) -> None:
    body = {"ignore_eos": True}
    got = chat(world, messages=HELLO, max_tokens=3, logit_bias={"2": 100}, logprobs=True, extra_body=body).choices[0]
    assert (got.message.content, got.finish_reason) == ("", "length")
    assert [one.token for one in got.logprobs.content] == ["<|im_end|>"] * 3
    ended = chat(world, messages=HELLO, max_tokens=3, logit_bias={"2": 100}, logprobs=True)
    assert (ended.choices[0].finish_reason, ended.choices[0].logprobs.content) == ("stop", [])
    assert ended.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
            "response_format",
            "invalid_grammar",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
            "invalid_grammar",
        ),
        ({"extra_body": {"regex": "("}}, "regex", "invalid_grammar"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "unknown_parameter"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"extra_body": {"stop_token_ids": [999999]}}, "stop_token_ids", "invalid_value"),
        ({"extra_body": {"min_tokens": 13}}, "min_tokens", "invalid_value"),
        ({"n": 200}, "n", "invalid_value"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_queued(
    world: World, asked: dict[str, Any], param: str, code: str
) -> None:
    before = world.stats()["prompt_tokens"]
    for stream in (False, True):
        error = refused(world, **asked, stream=stream)
        assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    stats = world.stats()
    assert (stats["prompt_tokens"], stats["running"], stats["waiting"]) == (before, 0, 0)
