"""What the endpoint takes and what it says no to, in the OpenAI API's terms."""

import json
import pickle
from typing import Any

import pytest

from graftwork.prompts.render import Message
from graftwork.serving.api.errors import ApiError
from graftwork.serving.api.openai_protocol import (
    ChatRequest,
    CompletionRequest,
    Envelope,
    arm_request,
    parse,
    sse,
    text_logprobs,
)
from graftwork.serving.engine.grammar import GrammarText
from graftwork.serving.engine.request import SamplingParams
from graftwork.serving.messages import ArmAnswer, ArmRequest, Spelled, TokenLogprob
from graftwork.serving.spec import ArmSpec

ARM = ArmSpec(name="base")
ASKED = (Message("user", "Hello"),)
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def body(**extra: object) -> bytes:
    return json.dumps({**HELLO, **extra}).encode()


def sent(kind: type[ChatRequest] | type[CompletionRequest], raw: bytes) -> ArmRequest:
    """The message that a replica gets for this body."""
    return arm_request(parse(kind, raw), ARM, "r", max_prompt_tokens=None, cache_salt="")


def refusal(raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, raw)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"
    return caught.value


def test_defaults_are_greedy_up_to_the_arms_limit() -> None:
    assert sent(ChatRequest, body()) == ArmRequest(ARM, ASKED, "r", SamplingParams())


def test_sampling_parameters_are_taken() -> None:
    asked = body(max_completion_tokens=9, temperature=0.7, top_p=0.9, top_k=40, seed=3, stop="END")
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=3, stop=("END",))
    assert sent(ChatRequest, asked) == ArmRequest(ARM, ASKED, "r", params, max_new_tokens=9)
    params = SamplingParams(stop=("a", "b"))
    listed = sent(ChatRequest, body(max_tokens=5, stop=["a", "b"]))
    assert listed == ArmRequest(ARM, ASKED, "r", params, max_new_tokens=5)


def test_every_sampling_parameter_arrives_under_its_name() -> None:
    asked = body(
        min_p=0.1,
        frequency_penalty=0.5,
        presence_penalty=-1,
        repetition_penalty=1.2,
        logit_bias={"5": 10, "7": -2.5},
        n=3,
        min_tokens=2,
        stop_token_ids=[4, 9],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=5,
    )
    params = SamplingParams(
        min_p=0.1,
        frequency_penalty=0.5,
        presence_penalty=-1,
        repetition_penalty=1.2,
        logit_bias=((5, 10), (7, -2.5)),
        min_new_tokens=2,
        logprobs=5,
    )
    whole = ArmRequest(ARM, ASKED, "r", params, n=3, stop_ids=(4, 9), ignore_eos=True)
    assert sent(ChatRequest, asked) == whole
    assert pickle.loads(pickle.dumps(whole)) == whole
    assert sent(ChatRequest, body(logprobs=True)).sampling.logprobs == 0
    assert sent(CompletionRequest, b'{"model":"m","prompt":"x","logprobs":2}').sampling.logprobs == 2


def test_a_response_format_becomes_a_grammar_with_its_properties_in_order() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    grammar = sent(ChatRequest, body(response_format=named)).grammar
    assert grammar == GrammarText("json_schema", json.dumps(schema))
    any_object = sent(ChatRequest, body(response_format={"type": "json_object"})).grammar
    assert any_object == GrammarText("json_schema", '{"type":"object"}')
    assert sent(ChatRequest, body(regex="[0-9]+")).grammar == GrammarText("regex", "[0-9]+")
    assert sent(ChatRequest, body(response_format={"type": "text"})).grammar is None


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"regex": "a", "response_format": {"type": "json_object"}}, "two grammars"),
        ({"regex": "a", "ignore_eos": True}, "contradict a grammar"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "contradict a grammar"),
        ({"top_logprobs": 2}, "needs logprobs=true"),
        ({"guided_json": {}}, "Here it is called response_format"),
    ],
)
def test_contradictions_are_told(extra: dict[str, object], found: str) -> None:
    assert found in refusal(body(**extra)).message


def test_content_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    taken = sent(ChatRequest, body(messages=turns)).question
    assert [(m.role, m.content) for m in taken if isinstance(m, Message)] == [("system", "d"), ("user", "ab")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("best_of", 2),
        ("echo", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("reasoning_effort", "high"),
        ("audio", {"voice": "alloy"}),
    ],
)
def test_what_is_not_served_is_refused_by_name(key: str, value: object) -> None:
    error = refusal(body(**{key: value}))
    assert (error.param, error.code) == (key, "unsupported_parameter")


def test_values_that_change_nothing_are_taken() -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "tools": None,
        "response_format": {"type": "text"},
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "u",
        "metadata": {"a": "b"},
        "temperature": None,
        "stop": None,
    }
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
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"min_p": 1.5}, "min_p", "invalid_value"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": "1"}, "presence_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_value"),
        ({"regex": ""}, "regex", "invalid_value"),
        ({"response_format": "json"}, "response_format", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        ({"guided_regex": "a"}, "guided_regex", "unknown_parameter"),
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
    error = refusal(body(messages=picture))
    assert str(error.param).startswith("messages.0.content")
    assert "only text is served" in error.message


@pytest.mark.parametrize(
    ("extra", "param", "said"),
    [
        ({"stop": list("abcde")}, "stop", "at most 4 items"),
        ({"stop": ["a", 3]}, "stop.1", "valid string (found 3)"),
        ({"stop": 3}, "stop", "valid string (found 3)"),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"temperature": -1}, "temperature", "it must be greater than or equal to 0 (found -1)"),
        ({"messages": []}, "messages", "messages: it needs at least 1 of them (found [])"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs=true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream=true"),
    ],
)
def test_errors_say_what_is_wrong_with_what_was_meant(extra: dict[str, object], param: str, said: str) -> None:
    error = refusal(body(**extra))
    assert error.param == param
    assert said in error.message
    assert "ChatRequest" not in error.message


def test_stream_options_need_a_stream() -> None:
    assert "stream=true" in refusal(body(stream_options={"include_usage": True})).message
    assert parse(ChatRequest, body(stream=True, stream_options={"include_usage": True})).stream


def test_two_different_limits_contradict() -> None:
    assert "differ" in refusal(body(max_tokens=3, max_completion_tokens=4)).message
    assert parse(ChatRequest, body(max_tokens=3, max_completion_tokens=3)).max_tokens == 3


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    ],
)
def test_no_body_is_too_broken_for_a_proper_error(raw: bytes) -> None:
    assert refusal(raw).message


def test_completions_are_short_unless_told_otherwise() -> None:
    plain = {"model": "base", "prompt": "x"}
    for extra, limit in (({}, 16), ({"max_tokens": None}, 16), ({"max_tokens": 40}, 40)):
        assert sent(CompletionRequest, json.dumps({**plain, **extra}).encode()).max_new_tokens == limit


def test_completions_take_one_text() -> None:
    assert parse(CompletionRequest, b'{"model":"m","prompt":"Once"}').prompt == "Once"
    for wrong in (b'{"model":"m","prompt":["a","b"]}', b'{"model":"m","prompt":""}', b'{"model":"m"}'):
        with pytest.raises(ApiError) as caught:
            parse(CompletionRequest, wrong)
        assert caught.value.param == "prompt"


def answer(**changes: Any) -> ArmAnswer:
    fields: dict[str, Any] = dict(
        request_id="r",
        arm="adapter",
        text="hi",
        adapter="card",
        adapter_version="abc",
        base_digest="d" * 64,
        retrieved_ids=("p1",),
        prompt_tokens=7,
        cached_tokens=2,
        completion_tokens=3,
        ttft_ms=1.5,
        latency_ms=9.0,
        finish_reason="stop",
        token_ids=(1, 2, 3),
    )
    return ArmAnswer(**{**fields, **changes})


def test_a_response_names_base_version_and_passages() -> None:
    whole = Envelope("chat", "r", "base:card", "d" * 64).build_response([answer()])
    assert whole["system_fingerprint"] == "fp_" + "d" * 12
    assert whole["choices"][0]["message"]["content"] == "hi"
    assert whole["usage"]["total_tokens"] == 10
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert {"arm": "adapter", "adapter_version": "abc", "retrieved_ids": ["p1"]}.items() <= whole["graftwork"].items()


def test_the_openai_library_reads_our_objects() -> None:
    """The types of the official client are the independent source of the shapes."""
    types = pytest.importorskip("openai.types.chat")
    envelope = Envelope("chat", "r", "base:card", "d" * 64)
    types.ChatCompletion.model_validate(envelope.build_response([answer()]))
    for chunk in (envelope.delta("h", first=True), envelope.last(answer()), envelope.usage_chunk([answer()])):
        types.ChatCompletionChunk.model_validate(chunk)


def test_several_answers_count_their_prompt_once() -> None:
    whole = Envelope("chat", "r", "base:card", "d" * 64).build_response([answer(), answer(index=1, cached_tokens=6)])
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 6,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_the_older_shape_of_log_probabilities_counts_characters() -> None:
    token, other = Spelled(tuple(b"\xe2\x82"), -0.5), Spelled(tuple(b" a"), -1.0)
    assert text_logprobs([TokenLogprob(token, (other,), 3)]) == {
        "tokens": ["\\xe2\\x82"],
        "token_logprobs": [-0.5],
        "text_offset": [3],
        "top_logprobs": [{" a": -1.0, "\\xe2\\x82": -0.5}],
    }


def test_events_keep_unicode_in_one_line() -> None:
    assert sse({"text": "é\n"}) == 'data: {"text":"é\\n"}\n\n'.encode()
