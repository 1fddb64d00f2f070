"""What the endpoint takes and what it says no to, in the OpenAI API's terms."""

import json
from typing import Any

import pytest

from graftwork.serving.api_error import ApiError
from graftwork.serving.arms import ArmAnswer, Sampling
from graftwork.serving.openai_responses import Envelope, sse
from graftwork.serving.openai_types import ChatRequest, CompletionRequest, parse

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def body(**extra: object) -> bytes:
    return json.dumps({**HELLO, **extra}).encode()


def refusal(raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, raw)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"
    return caught.value


def test_defaults_are_greedy_up_to_the_arms_limit() -> None:
    assert parse(ChatRequest, body()).sampling() == Sampling(None, 0.0, 1.0, 0, None, ())


def test_sampling_parameters_are_taken() -> None:
    asked = body(max_completion_tokens=9, temperature=0.7, top_p=0.9, top_k=40, seed=3, stop="END")
    assert parse(ChatRequest, asked).sampling() == Sampling(9, 0.7, 0.9, 40, 3, ("END",))
    assert parse(ChatRequest, body(max_tokens=5, stop=["a", "b"])).sampling() == Sampling(5, stop=("a", "b"))


def test_sampling_travels_through_json() -> None:
    sampling = Sampling(9, 0.7, 0.9, 40, 3, ("END",))
    assert Sampling.load(json.loads(json.dumps(sampling.dump()))) == sampling


def test_content_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    taken = [m.message() for m in parse(ChatRequest, json.dumps({"model": "m", "messages": turns}).encode()).messages]
    assert [(m.role, m.content) for m in taken] == [("system", "d"), ("user", "ab")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 10}),
        ("reasoning_effort", "high"),
        ("audio", {"voice": "alloy"}),
    ],
)
def test_what_is_not_served_is_refused_by_name(key: str, value: object) -> None:
    error = refusal(body(**{key: value}))
    assert (error.param, error.code) == (key, "unsupported_parameter")


def test_values_that_change_nothing_are_taken() -> None:
    neutral = {"n": 1, "logprobs": False, "tools": None, "response_format": {"type": "text"}, "frequency_penalty": 0.0,
               "logit_bias": {}, "user": "u", "metadata": {"a": "b"}, "temperature": None, "stop": None}  # fmt: skip
    assert parse(ChatRequest, body(**neutral)).temperature == 0.0


@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"tempratur": 1}, "tempratur", "unknown_parameter"),
        ({"max_tokens": "10"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"model": None}, "model", "invalid_value"),
        ({"model": 7}, "model", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "messages.0.tool_calls",
            "unknown_parameter",
        ),
    ],
)
def test_wrong_values_name_their_parameter(extra: dict[str, object], param: str, code: str) -> None:
    error = refusal(body(**extra))
    assert (error.param, error.code) == (param, code)


def test_pictures_are_refused() -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert str(refusal(body(messages=picture)).param).startswith("messages.0.content")


def test_stream_options_need_a_stream() -> None:
    assert "stream=true" in refusal(body(stream_options={"include_usage": True})).message
    assert parse(ChatRequest, body(stream=True, stream_options={"include_usage": True})).stream


def test_two_different_limits_contradict() -> None:
    assert "differ" in refusal(body(max_tokens=3, max_completion_tokens=4)).message
    assert parse(ChatRequest, body(max_tokens=3, max_completion_tokens=3)).limit() == 3


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nonsense", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000,
     b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
     b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":NaN}'],
)  # fmt: skip
def test_no_body_is_too_broken_for_a_proper_error(raw: bytes) -> None:
    assert refusal(raw).message


def test_completions_take_one_text() -> None:
    assert parse(CompletionRequest, b'{"model":"m","prompt":"Once"}').prompt == "Once"
    for wrong in (b'{"model":"m","prompt":["a","b"]}', b'{"model":"m","prompt":""}', b'{"model":"m"}'):
        with pytest.raises(ApiError) as caught:
            parse(CompletionRequest, wrong)
        assert caught.value.param == "prompt"


def answer(**changes: Any) -> ArmAnswer:
    fields: dict[str, Any] = dict(
        request_id="r", arm="adapter", text="hi", adapter="card", adapter_version="abc", base_digest="d" * 64,
        retrieved_ids=("p1",), prompt_tokens=7, cached_tokens=2, completion_tokens=3, ttft_ms=1.5, latency_ms=9.0,
        finish_reason="stop", token_ids=(1, 2, 3),
    )  # fmt: skip
    return ArmAnswer(**{**fields, **changes})


def test_answers_travel_through_json() -> None:
    assert ArmAnswer.load(json.loads(json.dumps(answer().dump()))) == answer()


def test_a_response_names_base_version_and_passages() -> None:
    whole = Envelope("chat", "r", "base:card", "d" * 64, 5).whole(answer())
    assert whole["system_fingerprint"] == "fp_" + "d" * 12
    assert whole["choices"][0]["message"]["content"] == "hi"
    assert whole["usage"]["total_tokens"] == 10
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert {"arm": "adapter", "adapter_version": "abc", "retrieved_ids": ["p1"]}.items() <= whole["graftwork"].items()


def test_the_openai_library_reads_our_objects() -> None:
    """The types of the official client are the independent source of the shapes."""
    types = pytest.importorskip("openai.types.chat")
    envelope = Envelope("chat", "r", "base:card", "d" * 64, 5)
    types.ChatCompletion.model_validate(envelope.whole(answer()))
    for chunk in (envelope.delta("h", first=True), envelope.last(answer()), envelope.usage_chunk(answer())):
        types.ChatCompletionChunk.model_validate(chunk)


def test_events_keep_unicode_in_one_line() -> None:
    assert sse({"text": "é\n"}) == 'data: {"text":"é\\n"}\n\n'.encode()
