"""Calls of tools in an answer's text, in the forms in which chat templates write them.

`<tool_call>` around JSON (Qwen, Hermes), around `<function=` and `<parameter=` (Qwen 3.5, Nemotron) or around keys
and values (GLM); `<tool_calls>` around JSON (Jamba, MiniMax-M1, Nemotron v2); `<function=` alone (Seed-OSS); JSON
objects alone (Llama 3.1 and 4); a JSON list (Mistral v0.3, Command A); names before JSON (gpt-oss, Kimi-K2, Mistral
Small 3, DeepSeek-V3); a list of Python calls (LFM2). Special tokens between the parts may be missing: an answer is
decoded without them.
"""

import ast
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
_KIMI = re.compile(r"functions\.([\w.-]+):\d+(?:<\|tool_call_argument_begin\|>)?\s*(?=\{)")
_MISTRAL = re.compile(r"\[TOOL_CALLS\]([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\](?=\{)")
_TAGGED = re.compile(r"<(tool_calls|TOOLCALL)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_TOKENS = re.compile(r"(?:\s|<\|[^|>]*\|>)*+")
_LIST = re.compile(rf"{_TOKENS.pattern}(?:\[TOOL_CALLS\])?\s*(?=\[\s*\{{)")
_PYTHON = re.compile(rf"{_TOKENS.pattern}(\[[\w.]+\(.*\)\]){_TOKENS.pattern}", re.DOTALL)
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
    elif found := next(filter(None, (list(form.finditer(text)) for form in _NAMES)), []):
        for call in found:
            yield ToolCall(call.group(1), _object(_read(text, call.end())[0]))
    elif tagged := list(_TAGGED.finditer(text)):
        for block in tagged:
            for value in _values(block.group(2)):
                yield from map(_json_call, value if isinstance(value, list) else [value])
    elif "<function=" in text:
        for block in _FUNCTION.finditer(text):
            yield _function_call(block, functions)
    elif listed := _LIST.match(text):
        yield from map(_json_call, _read(text, listed.end())[0])
    elif python := _PYTHON.fullmatch(text):
        yield from _python_calls(python.group(1), functions)
    else:
        yield from _plain_calls(text, functions)


_NAMES = (_HARMONY, _FENCED, _KIMI, _MISTRAL)
"""Forms of a name before its JSON."""


def _plain_calls(text: str, functions: Mapping[str, Any]) -> Iterator[ToolCall]:
    """Objects with name and arguments, and nothing else; or names of functions, each with its arguments behind it."""
    if '"parameters"' in text or '"arguments"' in text:
        try:
            found = _values(text)
        except MalformedCall:
            if any(name in text for name in functions):
                raise
            found = []
        if found and all(isinstance(one, dict) and one.keys() in _CALL_KEYS for one in found):
            yield from map(_json_call, found)
    names = "|".join(sorted(map(re.escape, functions), key=len, reverse=True))
    name, at = re.compile(rf"\s*({names})(?:[A-Za-z0-9]{{9}})?\s*(?=\{{)"), 0  # behind the name an id of Mistral's
    while names and (call := name.match(text, at)):
        arguments, at = _read(text, call.end())
        yield ToolCall(call.group(1), _object(arguments))


_CALL_KEYS = ({"name", "parameters"}, {"name", "arguments"})


def _values(text: str) -> list[Any]:
    """JSON objects and lists, one behind another, with special tokens between them; none where there is other text."""
    found, at = [], _TOKENS.match(text).end()  # type: ignore[union-attr]
    while text[at : at + 1] in ("{", "["):
        value, at = _read(text, at)
        found.append(value)
        at = _TOKENS.match(text, at).end()  # type: ignore[union-attr]
    return found if at == len(text) else []


def _python_calls(text: str, functions: Mapping[str, Any]) -> list[ToolCall]:
    """Calls in a list with arguments by name; none where the text names no function and is something else."""
    try:
        [statement] = ast.parse(text).body
        calls = statement.value.elts  # type: ignore[attr-defined]
        return [] if any(call.args for call in calls) else [_python_call(call) for call in calls]
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        if any(name in text for name in functions):
            raise MalformedCall(f"the call is not Python ({error})") from None
        return []


def _python_call(call: ast.Call) -> ToolCall:
    arguments = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords if one.arg is not None}
    if len(arguments) < len(call.keywords):
        raise ValueError("an argument has no name")
    return ToolCall(ast.unparse(call.func), json.loads(json.dumps(arguments)))


def _block_calls(body: str, functions: Mapping[str, Any]) -> Iterator[ToolCall]:
    if body.lstrip().startswith("{"):
        value, end = _read(body, 0)
        if body[end:].strip():
            raise MalformedCall(f"text behind the call: {body[end:].strip()[:40]!r}")
        yield _json_call(value)
    elif written := _FUNCTION.fullmatch(body):
        yield _function_call(written, functions)
    else:
        name, _, _ = body.partition("<arg_key>")
        if not re.fullmatch(r"\s*[\w.-]+\s*", name):
            raise MalformedCall(f"no call between the tags: {body.strip()[:40]!r}")
        yield ToolCall(name.strip(), _typed(_KEY_AND_VALUE.findall(body), functions.get(name.strip(), {})))


def _function_call(written: re.Match[str], functions: Mapping[str, Any]) -> ToolCall:
    name, body = written.group(1).strip(), written.group(2)
    if body.lstrip().startswith("{"):
        return ToolCall(name, _object(_read(body, 0)[0]))
    return ToolCall(name, _typed(_PARAMETER.findall(body), functions.get(name, {})))


def _json_call(value: Any) -> ToolCall:
    name = value.get("name", value.get("tool_name")) if isinstance(value, dict) else None
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
