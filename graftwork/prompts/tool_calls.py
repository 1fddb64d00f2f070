"""Tool calls in the text of an answer, in the forms that chat templates write them.

The forms, by what the text contains: `<tool_call>` with JSON (Hermes, Qwen 2.5 and 3, SmolLM3, Granite), with a name
and `<arg_key>` lines (GLM-4.5) or with `<function=...>` (Qwen 3.5, Nemotron 3); one JSON object with `parameters`
(Llama 3.1); a JSON list (Mistral); `functions.NAME` before JSON (gpt-oss); a name before a code fence (DeepSeek-V3).
Special tokens between the parts may be missing: an answer's text is decoded without them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graftwork.prompts.render import Tool, ToolCall

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_KEY_AND_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_HARMONY = re.compile(r"functions\.([\w-]+?)(?:<\|channel\|>)?commentary\s*(?:<\|constrain\|>)?json(?:<\|message\|>)?")
_FENCED = re.compile(r"(?:<｜tool▁sep｜>|function)\s*([\w.-]+)\n```json\n")
_LIST = re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*(?=\[\s*\{)")
_OBJECT = re.compile(r"(?:\s|<\|[^|>]*\|>)*(\{.*?)(?:\s|<\|[^|>]*\|>)*", re.DOTALL)
_JSON = json.JSONDecoder()


class MalformedCall(ValueError):
    """The text begins a tool call and does not complete it as its form wants."""


def parse_tool_calls(text: str, tools: Sequence[Tool] = ()) -> tuple[ToolCall, ...]:
    """Return the calls of an answer in the order written; none where it is plain text. Raises MalformedCall.

    tools: their schemas decide whether an argument that a form writes without quotes is a string.
    """
    return tuple(_calls(text, {tool["function"]["name"]: tool["function"] for tool in tools}))


def _calls(text: str, functions: Mapping[str, Any]) -> Iterator[ToolCall]:
    if "<tool_call>" in text:
        for block in _BLOCK.finditer(text):
            yield from _block_calls(block.group(1), functions)
    elif found := list(_HARMONY.finditer(text)) or list(_FENCED.finditer(text)):
        for call in found:
            yield ToolCall(call.group(1), _object(_read(text, call.end())[0]))
    elif listed := _LIST.match(text):
        for value in _read(text, listed.end())[0]:
            yield _json_call(value)
    elif '"parameters"' in text and (alone := _OBJECT.fullmatch(text.strip())):
        value, end = _read(alone.group(1), 0)
        if not alone.group(1)[end:].strip() and {"name", "parameters"} <= value.keys():
            yield _json_call(value)


def _block_calls(body: str, functions: Mapping[str, Any]) -> Iterator[ToolCall]:
    if body.lstrip().startswith("{"):
        value, end = _read(body, 0)
        if body[end:].strip():
            raise MalformedCall(f"text behind the call: {body[end:].strip()[:40]!r}")
        yield _json_call(value)
    elif written := _FUNCTION.fullmatch(body):
        name = written.group(1).strip()
        yield ToolCall(name, _typed(_PARAMETER.findall(written.group(2)), functions.get(name, {})))
    else:
        name, _, _ = body.partition("<arg_key>")
        if not re.fullmatch(r"\s*[\w.-]+\s*", name):
            raise MalformedCall(f"no call between the tags: {body.strip()[:40]!r}")
        yield ToolCall(name.strip(), _typed(_KEY_AND_VALUE.findall(body), functions.get(name.strip(), {})))


def _json_call(value: Any) -> ToolCall:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise MalformedCall("a call is an object with a name")
    arguments = value.get("arguments", value.get("parameters"))
    return ToolCall(name, _object(_read(arguments, 0)[0] if isinstance(arguments, str) else arguments))


def _typed(pairs: Sequence[tuple[str, str]], function: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments from text: JSON, but a string where the tool's schema says so or where it is no JSON."""
    properties = (function.get("parameters") or {}).get("properties") or {}
    found: dict[str, Any] = {}
    for key, text in ((key.strip(), text) for key, text in pairs):
        schema = properties.get(key)
        is_text = isinstance(schema, Mapping) and schema.get("type") == "string"
        try:
            found[key] = text if is_text else json.loads(text)
        except (ValueError, RecursionError):
            found[key] = text
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedCall("the arguments are no JSON object")
    return value


def _read(text: str, start: int) -> tuple[Any, int]:
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return _JSON.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise MalformedCall(f"the call is not JSON ({error})") from None
