"""Turns of a conversation: parsing of OpenAI's and ShareGPT's form, tool calls, and the rules that turns follow.

Sources of the keys: OpenAI's fine-tuning guide (`weight`, `name`, `tool_calls`, `function_call`, content parts),
Axolotl (`train`, `training`), ms-swift (`loss`, `loss_scale`, roles `tool_call` and `tool_response`), LLaMA-Factory's
`dataset_info.json` (`from`, `value`, roles `observation` and `function_call`), chat templates of transformers
(`reasoning_content`, gpt-oss: `thinking`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from graftwork.datasets.keys import KeyCheck, is_empty, kind_of, reject_lone_surrogates
from graftwork.errors import DataError
from graftwork.prompts.render import Message, Role, Thinking, Tool, ToolCall
from graftwork.prompts.turns import check_calls

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn that hold its reasoning: one of them, or all with the same text."""
THINKING_MODE = "thinking_mode"
"""Key of an assistant turn that overrides `data.thinking`."""
_COMMON = frozenset({"name", "tool_call_id", THINKING_MODE, *REASONING})
_OPENAI_ROLES = {"system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool"}
_SWIFT_ROLES = {"tool_response": "tool"}
_SHAREGPT_ROLES = _OPENAI_ROLES | {
    **_SWIFT_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CALL_ROLES = frozenset({"function_call", "tool_call"})
"""Roles of ShareGPT and ms-swift: the text of the turn is the JSON of one call, or of a list of calls."""
_RENAMES = {
    "human": "rename the role to 'user'",
    "gpt": "rename the role to 'assistant'",
    "model": "rename the role to 'assistant'",
    "bot": "rename the role to 'assistant'",
    "ipython": "rename the role to 'tool'",
    "observation": "rename the role to 'tool'",
}


@dataclass(frozen=True)
class TurnForm:
    """Keys of a turn: OpenAI's `role` and `content`, or ShareGPT's `from` and `value`."""

    role: str = "role"
    content: str = "content"
    sharegpt: bool = False

    @property
    def known(self) -> frozenset[str]:
        """Keys that a turn of this form may have."""
        calls = () if self.role == "from" else ("tool_calls", "function_call")
        return _COMMON.union((self.role, self.content), calls)


OPENAI = TurnForm()
SHAREGPT = TurnForm("from", "value", sharegpt=True)
SHAREGPT_AS_OPENAI = TurnForm(sharegpt=True)


@dataclass(frozen=True)
class TurnReader:
    """Parser of the turns of one row. `keys` checks and counts their keys; `learned` turns are those of the loss."""

    where: str
    keys: KeyCheck
    learned: bool = True

    def turns(self, value: Any, field: str, *, sharegpt: bool = False) -> tuple[Message, ...]:
        """The turns of a list. Raises DataError that names the row, the turn and the key."""
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else kind_of(value)
            rule = f"{field} is a list of turns with role and content"
            hint = f'set data.template={{{field}: "{{{{ {field} }}}}"}}' if isinstance(value, str) else ""
            raise DataError(f"{self.where}: {field}", f"found {found}", rule, hint)
        messages: list[Message] = []
        for index, turn in enumerate(value):
            message = self.turn(turn, f"{field}[{index}]", field, sharegpt=sharegpt)
            if messages and messages[-1].role == "assistant" and _given_role(turn) in _CALL_ROLES:
                message = _with_calls(messages.pop(), message, f"{self.where}: {field}[{index}]")
            messages.append(message)
        return tuple(messages)

    def turn(self, turn: Any, at: str, field: str, *, sharegpt: bool = False) -> Message:
        """One turn; at: its place in the row, `messages[1]`."""
        place = f"{self.where}: {at}"
        if not isinstance(turn, dict):
            raise DataError(place, f"found {kind_of(turn)}", "a turn is an object with role and content")
        form = (SHAREGPT if "from" in turn else SHAREGPT_AS_OPENAI) if sharegpt else OPENAI
        given = turn.get(form.role)
        role = self._role(given, turn, f"{place}.{form.role}", form)
        learned = role == "assistant" and self.learned
        trained = self.keys.turn(turn, place, field, form.known, learned=learned)
        calls = self._calls(turn, place, role, field)
        content = turn.get(form.content)
        if given in _CALL_ROLES:
            if calls:
                problem = "found in a turn whose text is a call"
                raise DataError(f"{place}.tool_calls", problem, "a turn has its calls once", "keep one of them")
            calls, content = _calls_of_text(content, f"{place}.{form.content}"), ""
        elif isinstance(content, list):
            content = _joined(content, f"{place}.{form.content}")
        optional = bool(calls) or role in ("system", "developer", "tool")
        if not (calls and content is None):
            require_text(content, f"{place}.{form.content}", form.content, form.content in turn, may_be_empty=optional)
        name, call_id = (_optional_text(turn.get(key), f"{place}.{key}") for key in ("name", "tool_call_id"))
        if name is not None and role != "tool":
            self.keys.speaker()
        if call_id is not None and role != "tool":
            raise DataError(f"{place}.tool_call_id", f"found in a turn of role {role}", "it belongs to a turn of tool")
        return Message(
            role,
            content or "",
            tool_calls=calls,
            tool_call_id=call_id,
            name=name,
            reasoning=_reasoning(turn, place, role),
            trained=trained if learned else True,
            thinking=_thinking(turn, place, role),
        )

    def _role(self, given: Any, turn: Mapping[str, Any], at: str, form: TurnForm) -> Role:
        roles = _SHAREGPT_ROLES if form.sharegpt else _OPENAI_ROLES
        if isinstance(given, str):
            if given in _CALL_ROLES:
                return "assistant"
            if given == "function":
                return "tool"  # of OpenAI's older form
            if known := (roles | _SWIFT_ROLES).get(given):
                return cast(Role, known)
        found = "the field is missing" if form.role not in turn else f"found {given!r}"
        hint = _RENAMES.get(given, "") if isinstance(given, str) else ""
        if "from" in turn and not form.sharegpt:
            hint = "turns of from and value are ShareGPT's: name the list `conversations`"
        raise DataError(at, found, f"{form.role} is one of {', '.join(roles)}", hint)

    def _calls(self, turn: Mapping[str, Any], place: str, role: Role, field: str) -> tuple[ToolCall, ...]:
        """The calls of `tool_calls`, or the one of the older `function_call`."""
        given = {key: turn[key] for key in ("tool_calls", "function_call") if not is_empty(turn.get(key))}
        if not given:
            return ()
        if len(given) == 2 or role != "assistant":
            key = list(given)[-1]
            found = "found next to tool_calls" if len(given) == 2 else f"found in a turn of role {role}"
            raise DataError(f"{place}.{key}", found, "an assistant's turn has its calls in tool_calls")
        if "function_call" in given:
            return (_call(given["function_call"], f"{place}.function_call", None),)
        if not isinstance(given["tool_calls"], list):
            found = f"found {kind_of(given['tool_calls'])}"
            raise DataError(f"{place}.tool_calls", found, "tool_calls is a list of calls")
        calls = []
        for index, call in enumerate(given["tool_calls"]):
            at = f"{place}.tool_calls[{index}]"
            if not isinstance(call, dict):
                raise DataError(at, f"found {kind_of(call)}", "a call is an object with function: name and arguments")
            if call.get("type", "function") not in ("function", None):
                raise DataError(f"{at}.type", f"found {call['type']!r}", "a call is of type function")
            nested = call.get("function")
            if extra := [key for key in call if nested and key not in ("function", "id", "type", "index")]:
                self.keys.ignore(*(f"{field}[].tool_calls[].{key}" for key in extra))
            calls.append(_call(nested if nested is not None else call, at, call.get("id")))
        return tuple(calls)


def _with_calls(said: Message, calls: Message, at: str) -> Message:
    """One turn of the assistant: what it said or called, and the calls of the turns behind it, as in ms-swift."""
    if said.trained != calls.trained:
        raise DataError(at, "its weight differs from the turn before", "text and calls of one turn have one weight")
    if calls.reasoning is not None:
        rule = "a call is part of the assistant's turn before it, whose reasoning comes first"
        raise DataError(at, "it has reasoning of its own", rule, "move the reasoning to the turn before")
    return replace(said, tool_calls=said.tool_calls + calls.tool_calls)


def _given_role(turn: Mapping[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))


def require_text(value: Any, at: str, key: str, given: bool, *, may_be_empty: bool = False, hint: str = "") -> str:
    """The text of a key. Raises DataError where it is no string, blank, or no Unicode. hint: of a missing key."""
    if not isinstance(value, str):
        found = f"found {kind_of(value)}" if given else "the field is missing"
        raise DataError(at, found, f"{key} is a string", "" if given else hint)
    if not value.strip() and not may_be_empty:
        raise DataError(at, "it is empty", f"{key} holds text")
    reject_lone_surrogates(value, at)
    return value


def check_turns(messages: Sequence[Message], where: str, field: str) -> None:
    """Raise DataError for turns out of order: system turns, calls without results, results without calls."""
    if not any(message.role == "user" for message in messages):
        raise DataError(f"{where}: {field}", "it has no user turn", "a conversation has at least one user turn")
    for index, message in enumerate(messages):
        if message.role in ("system", "developer") and index:
            at = f"{where}: {field}[{index}].role"
            raise DataError(at, f"found {message.role!r}", f"a {message.role} turn comes first, once")
    try:
        check_calls(messages)
    except DataError as error:
        subject, problem = (text.replace("messages[", f"{field}[") for text in (error.subject, error.problem))
        none = not any(message.tool_calls for message in messages)
        hint = "write the call into tool_calls of the turn before, or as ShareGPT's function_call"
        raise DataError(f"{where}: {subject}", problem, error.rule, hint if none else error.hint) from None


def turn_content(message: Message) -> list[Any]:
    """What a turn says, without ids and weights: equal for turns that are the same but for those."""
    calls = [[call.name, dict(call.arguments)] for call in message.tool_calls]
    return [message.role, message.content, message.name, message.reasoning, calls]


def read_tools(value: Any, where: str, key: str) -> tuple[Tool, ...]:
    """Functions in OpenAI's form, from a list or its JSON text; a bare function is put into the form."""
    at = f"{where}: {key}"
    if isinstance(value, str):
        value = _json(value, at) if value.strip() else []
    if is_empty(value):
        return ()
    if not isinstance(value, list):
        raise DataError(at, f"found {kind_of(value)}", f"{key} is a list of functions, or its JSON text")
    reject_lone_surrogates(json.dumps(value, ensure_ascii=False), at)
    tools: list[Tool] = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{at}[{index}]", "it has no name", "a tool is {type: function, function: {name, ...}}")
        if tool.get("type", "function") != "function" and "function" in tool:
            raise DataError(f"{at}[{index}].type", f"found {tool['type']!r}", "a tool is of type function")
        tools.append(tool if "function" in tool else {"type": "function", "function": function})
    return tuple(tools)


def _call(value: Any, at: str, identity: Any) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise DataError(f"{at}.name", "the field is missing", "a call has name and arguments")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{at}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        found = f"found {kind_of(arguments)}"
        raise DataError(f"{at}.arguments", found, "arguments is a JSON object, or its text", "name each argument")
    reject_lone_surrogates(json.dumps(arguments, ensure_ascii=False), f"{at}.arguments")
    return ToolCall(value["name"], arguments, _optional_text(identity, f"{at}.id"))


def _calls_of_text(value: Any, at: str) -> tuple[ToolCall, ...]:
    found = _json(value, at) if isinstance(value, str) else value
    return tuple(_call(one, at, None) for one in (found if isinstance(found, list) else [found]))


def _json(text: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            at, f"it is not JSON ({error})", "it is JSON, or its text", 'for example {"city": "Oslo"}'
        ) from None


_PARTS = {
    **dict.fromkeys(("tool_use", "tool_result"), "write calls as tool_calls, and each result as a turn of role tool"),
    **dict.fromkeys(("thinking", "reasoning"), "write it as reasoning_content of the turn"),
}
"""Hints for parts of Anthropic's form."""


def _joined(parts: list[Any], at: str) -> str:
    """The text of OpenAI's content parts, as transformers' templates join them: without anything between."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict):
            hint = _PARTS.get(str(kind), "leave the row out, or the part where it is of no use")
            raise DataError(f"{at}[{index}].type", f"found {kind!r}", "content is text, or parts of type text", hint)
        else:
            raise DataError(f"{at}[{index}]", f"found {kind_of(part)}", "a content part is {type: text, text: ...}")
    return "".join(texts)


def _reasoning(turn: Mapping[str, Any], place: str, role: Role) -> str | None:
    given = {key: turn[key] for key in REASONING if not is_empty(turn.get(key))}
    if not given:
        return None
    key, text = next(iter(given.items()))
    if role != "assistant":
        raise DataError(
            f"{place}.{key}", f"found in a turn of role {role}", "reasoning is the assistant's", "move it to the answer"
        )
    for other, value in given.items():
        require_text(value, f"{place}.{other}", other, True)
        if value != text:
            raise DataError(f"{place}.{other}", f"it differs from {key}", "a turn has one reasoning", "keep one key")
    return cast(str, text)


def _thinking(turn: Mapping[str, Any], place: str, role: Role) -> Thinking | None:
    value = turn.get(THINKING_MODE)
    if is_empty(value):
        return None
    if value not in get_args(Thinking) or role != "assistant":
        found = f"found {value!r} in a turn of role {role}"
        raise DataError(f"{place}.{THINKING_MODE}", found, "an assistant's turn has keep, mask or drop")
    return cast(Thinking, value)


def _optional_text(value: Any, at: str) -> str | None:
    if is_empty(value):
        return None
    if not isinstance(value, str):
        raise DataError(at, f"found {kind_of(value)}", "it is a string")
    reject_lone_surrogates(value, at)
    return value
