"""Calls read back from what chat templates write, with special tokens and without them."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from trl.chat_template_utils import __file__ as _inside_trl

from graftwork.prompts.template import compile_template
from graftwork.prompts.tool_calls import MalformedCall, parse_tool_calls

TEMPLATES = Path(_inside_trl).parent / "chat_templates"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find_airport",
            "description": "Find an airport.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}, "radius_km": {"type": "integer"}, "tags": {"type": "array"}},
                "required": ["code"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
    },
]
ONE = [("find_airport", {"code": "007", "radius_km": 12, "tags": ["a", 'quo"te', "{brace}"]})]
TWO = [*ONE, ("now", {})]


def written(template: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What the template writes for an assistant's turn with the calls."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Where is 007?"}]
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": f"call{n:05d}", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(calls)
        ],
    }
    jinja = compile_template((TEMPLATES / f"{template}.jinja").read_text())
    settings: dict[str, Any] = {"tools": TOOLS, "bos_token": "", "eos_token": "", "strftime_now": lambda _: "1 May"}
    prompt = jinja.render(messages=turns, add_generation_prompt=True, **settings)
    whole = jinja.render(messages=[*turns, answer], add_generation_prompt=False, **settings)
    same = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return whole[same:]


@pytest.mark.parametrize("bare", [False, True], ids=["with specials", "without specials"])
@pytest.mark.parametrize(
    ("template", "most"),
    [
        ("qwen2_5", 2),
        ("qwen3", 2),
        ("qwen3_instruct_2507", 2),
        ("qwen3_5_think", 2),
        ("glm4moe", 2),
        ("llama3_1", 1),
        ("llama3_2", 1),
        ("gptoss", 1),
        ("nemotron_3_nano", 2),
    ],
)
def test_calls_are_read_as_the_template_writes_them(template: str, most: int, bare: bool) -> None:
    for calls in [ONE, TWO][:most]:
        text = written(template, calls)
        if bare:
            text = re.sub(r"<\|[^|>]*\|>", "", text)
        assert [(call.name, call.arguments) for call in parse_tool_calls(text, TOOLS)] == calls


def test_mistrals_list_is_read_with_and_without_its_token() -> None:
    text = '[{"name": "now", "arguments": {}}, {"name": "find_airport", "arguments": {"code": "KJFK"}}]'
    for answer in (text, f"[TOOL_CALLS]{text}", f"[TOOL_CALLS] {text}"):
        assert [call.name for call in parse_tool_calls(answer)] == ["now", "find_airport"]


@pytest.mark.parametrize(
    "text",
    [
        "It lies in Lagos.",
        '{"icao": "KJFK", "name": "Kennedy"}',
        "",
        "[1] and [2] say so",
        "now() was called",
        "[see(this)]",
        "[Note(see the appendix)]",
        '{x} is "parameters"',
        '[Note] the "arguments" of it',
        '{"arguments": 1}',
    ],
)
def test_plain_answers_and_json_answers_hold_no_call(text: str) -> None:
    assert parse_tool_calls(text, TOOLS) == ()


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "now", "arguments": {}',
        '<tool_call>\n{"name": "now", "arguments": "soon"}\n</tool_call>',
        '<tool_call>\n{"nome": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}} and more\n</tool_call>',
        "<tool_call>\n</tool_call>",
        '{"name": "now", "parameters": [1]}',
        '[{"name": "now", "arguments": {}',
        "[now(zone={1, 2})]",
        "[now(zone=b'CET')]",
        "[now(**{'zone': 1})]",
    ],
)
def test_a_broken_call_is_no_plain_text(text: str) -> None:
    with pytest.raises(MalformedCall):
        parse_tool_calls(text, TOOLS)


@pytest.mark.parametrize("parameters", [None, {"properties": None}, {"properties": {"code": True}}, {}])
def test_arguments_of_a_tool_without_a_schema_are_read(parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": parameters}}]
    text = "<tool_call>find\n<arg_key>code</arg_key>\n<arg_value>12</arg_value>\n</tool_call>"
    assert [dict(call.arguments) for call in parse_tool_calls(text, tools)] == [{"code": 12}]


def test_a_long_answer_is_read_in_linear_time() -> None:
    began = time.process_time()
    assert parse_tool_calls("{" + "\n" * 200_000 + "x" + "\n" * 200_000) == ()
    assert parse_tool_calls(" " * 200_000 + "x", TOOLS) == ()
    assert time.process_time() - began < 5
