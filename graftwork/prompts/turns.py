"""Turns of a conversation in the form that a base's chat template reads, and the checks on calls and reasoning."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.errors import BaseModelError, DataError
from graftwork.prompts.capabilities import Turn, refusal_of_calls, written_call
from graftwork.spec_errors import did_you_mean

if TYPE_CHECKING:
    from graftwork.prompts.render import Message, Thinking, Tool, ToolCall
    from graftwork.prompts.template import Template

_TAGGED = re.compile(r"\s*(?:<think>)?(?P<reasoning>.*?)</think>\s*", re.DOTALL)
_ROUTE = "set base.chat_template=hermes, which writes functions and calls as text, or take another base"
Write = Callable[[Sequence[Turn], bool], str]
"""Sealed text of turns; the second argument asks for the generation prompt."""


_TEXT_CALL = re.compile(r"<tool_call>|<function|\A\s*\[.+\)\]\s*\Z", re.DOTALL)
"""A call as text of an answer: Hermes', glaive's and ToolACE's data."""


def check_calls(messages: Sequence["Message"]) -> None:
    """Raise DataError for a call without its result, a result without a call, reasoning or calls of another role.

    Results may follow a call that is text of the answer: both are left as they are written.
    """
    open_calls: list[ToolCall] = []
    caller, as_text = 0, False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role != "assistant" and message.reasoning is not None:
            raise DataError(f"{where}.reasoning_content", f"the turn is the {message.role}'s", _ONLY_ASSISTANT)
        if message.role != "assistant" and message.tool_calls:
            raise DataError(f"{where}.tool_calls", f"the turn is the {message.role}'s", _ONLY_ASSISTANT)
        if message.role == "tool":
            if open_calls or not as_text:
                open_calls.remove(_call_of(message, open_calls, where))
        elif open_calls:
            raise _unanswered(open_calls, caller, f"it is followed by {where} of the {message.role}")
        else:
            as_text = not message.tool_calls and bool(_TEXT_CALL.search(message.content))
        open_calls += message.tool_calls
        caller = index if message.tool_calls else caller
    if open_calls and messages[-1].role == "tool":
        raise _unanswered(open_calls, caller, "the conversation ends")


_ONLY_ASSISTANT = "reasoning and calls are the assistant's"


def _call_of(message: "Message", open_calls: Sequence["ToolCall"], where: str) -> "ToolCall":
    """The call that a result answers: by id where both have one, else by order."""
    identity = message.tool_call_id
    with_id = [call for call in open_calls if call.id == identity]
    if identity is not None and with_id:
        return with_id[0]
    if open_calls and (identity is None or all(call.id is None for call in open_calls)):
        return open_calls[0]
    found = "no call before it is without a result"
    if open_calls:
        found = f"found {identity!r}, and the calls without a result are {[call.id for call in open_calls]}"
    rule = "each result of a tool answers one call of the turn before"
    raise DataError(f"{where}.tool_call_id", found, rule, "add the call to the turn before, or remove the result")


def _unanswered(calls: Sequence["ToolCall"], caller: int, problem: str) -> DataError:
    return DataError(
        f"messages[{caller}].tool_calls: call of {calls[0].name!r}",
        f"it has no result: {problem}",
        "each call but those of the last turn is followed by a turn of role tool with its result",
        "add the result behind the call, or end the row with the call",
    )


def apply_thinking(message: "Message", thinking: "Thinking", template: "Template") -> "Message":
    """Return an assistant's turn with its reasoning where the template reads it, or without (`drop`).

    `<think>` at the start of the content is reasoning like `reasoning_content`; it stays in the content where the
    template reads it there.
    """
    if message.role != "assistant":
        return message
    message = dataclasses.replace(message, thinking=message.thinking or thinking)
    reasoning, content = reasoning_of(message)
    if message.thinking == "drop":
        return dataclasses.replace(message, reasoning=None, content=content)
    if reasoning is not None and not template.can.reads_tags and template.can.reasoning is not None:
        return dataclasses.replace(message, reasoning=reasoning, content=content)
    return message


def reasoning_of(message: "Message") -> tuple[str | None, str]:
    """(reasoning, content without it) of an assistant's turn."""
    if message.reasoning is not None:
        return message.reasoning, message.content
    found = _TAGGED.match(message.content)
    return (found["reasoning"].strip(), message.content[found.end() :]) if found else (None, message.content)


def template_variables(
    template: "Template", prompt: Mapping[str, Any], row: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Return the variables of the prompt and, over them, of the row. Raises DataError for one that is never read."""
    variables = {**prompt, **(row or {})}
    if unread := [name for name in variables if name not in template.variables]:
        known = ", ".join(sorted(template.variables)) or "none"
        raise DataError(
            f"chat_template_kwargs: {unread[0]}",
            f"the chat template of {template.base} does not read it",
            f"variables that it reads: {known}",
            did_you_mean(unread[0], sorted(template.variables)) or "leave it out",
        )
    return variables


def turns_of(
    messages: Sequence["Message"], template: "Template", tools: Sequence["Tool"], first: int = 0
) -> list[Turn]:
    """Return the turns as dictionaries of the template's form. first: place of `messages[0]` of the row in them.

    Raises BaseModelError for a template that does not write functions, calls or results; DataError for a turn that it
    would cut.
    """
    can = template.can
    if tools and not can.tools:
        raise _no_tools(template, f"it leaves functions out ({len(tools)} given)", "tools")
    has_calls = any(message.tool_calls or message.role == "tool" for message in messages)
    if has_calls and can.calls_need_tools and not tools:
        rule = f"the chat template of {template.base} writes calls only where functions are given"
        raise DataError("messages.tool_calls", "the row has calls and no tools", rule, "add tools to the row")
    if can.calls is None and has_calls:
        found = refusal_of_calls(template)
        raise _no_tools(template, found or "it leaves calls or their results out", "tool_calls")
    if can.calls is not None and can.calls.short_ids:
        messages = _with_ids(messages)
    return [_turn_of(message, template, f"messages[{at - first}]") for at, message in enumerate(messages)]


def _with_ids(messages: Sequence["Message"]) -> list["Message"]:
    """Return the turns with an id for each call that has none, by its place, and for its result."""
    found: list[Message] = []
    asked: list[ToolCall] = []
    ids: list[str] = []
    for at, message in enumerate(messages):
        if message.role == "tool" and asked:
            place = asked.index(_call_of(message, asked, f"messages[{at}]"))
            message = dataclasses.replace(message, tool_call_id=ids.pop(place))
            del asked[place]
        elif message.tool_calls:
            asked = list(message.tool_calls)
            ids = [call.id or f"{at}.{place}" for place, call in enumerate(asked)]
            named = (dataclasses.replace(call, id=own) for call, own in zip(asked, ids, strict=True))
            message = dataclasses.replace(message, tool_calls=tuple(named))
        found.append(message)
    return found


def _no_tools(template: "Template", problem: str, key: str) -> BaseModelError:
    rule = f"{key} of a row or a prompt are rendered by the base's own template"
    return BaseModelError(f"chat template of {template.base}", problem, rule, _ROUTE)


def _turn_of(message: "Message", template: "Template", where: str) -> Turn:
    can = template.can
    role = "system" if message.role == "developer" and not can.developer else message.role
    turn: dict[str, Any] = {"role": role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = can.calls.id_of(message.tool_call_id) if can.calls else message.tool_call_id
    if message.reasoning is not None:
        if can.reasoning == "tags":
            turn["content"] = f"<think>\n{message.reasoning.strip()}\n</think>\n\n{message.content}"
        elif can.reasoning != "opened":
            turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if not message.tool_calls or can.calls is None:
        return turn
    if len(message.tool_calls) > 1 and not can.parallel_calls:
        found = f"a turn of {len(message.tool_calls)} calls"
        raise _cut(template, where, found, "one call a turn", "write a turn for each call")
    if not turn["content"].strip():
        turn["content"] = can.calls.no_content
    elif not can.text_with_calls:
        found, hint = "a turn with text and a call", "leave the content of the turn empty"
        raise _cut(template, where, found, "a call without text", hint)
    if can.call_ids and any(call.id is None for call in message.tool_calls):
        rule = f"the chat template of {template.base} writes the id of each call, not its name"
        raise DataError(f"{where}.tool_calls.id", "a call has none", rule, "add the ids, as functions.NAME:INDEX")
    as_text = can.calls.arguments == "text"
    turn["tool_calls"] = [
        written_call(
            call.name,
            json.dumps(call.arguments, ensure_ascii=False) if as_text else dict(call.arguments),
            can.calls.id_of(call.id),
        )
        for call in message.tool_calls
    ]
    return turn


def _cut(template: "Template", where: str, found: str, wanted: str, hint: str) -> DataError:
    rule = f"the chat template of {template.base} writes {wanted}, and would leave out the rest"
    return DataError(f"{where}.tool_calls", found, rule, f"{hint}, or set base.chat_template=hermes")


def answer_behind(
    prompt: str, text: str, turns: Sequence[Turn], reasoning: str, template: "Template", write: Write
) -> str:
    """Return the text with its last answer right behind the prompt that asks for it, as in generation.

    Two things differ between templates' prompts and stored answers. The generation prompt opens reasoning that a stored
    answer lacks (DeepSeek-R1), or has a line end more (Nemotron 3). Earlier turns are written otherwise once the answer
    is there (gpt-oss, Mistral). The text is returned unchanged where the answer cannot be found in it.
    reasoning: of the last turn.
    """
    if text.startswith(prompt):
        return text
    think, close = template.seal_token("<think>"), template.seal_token("</think>")
    shared = template.token_boundary(prompt, len(os.path.commonprefix([prompt, text])))
    if prompt[:shared].endswith(think) and not prompt[shared:].strip():
        return prompt + text[shared:]
    asked = write(turns[:-1], False)
    if prompt.startswith(asked) and text.startswith(asked):
        shared = min(shared, prompt.find(think, len(asked)) % (len(prompt) + 1))
        extra, rest = prompt[shared:], text[shared:]
        if (reasoning and reasoning in rest) or rest.startswith(think):
            return text
        if think in extra and close not in extra:
            return prompt + (rest if rest.startswith(close) else f"{reasoning}\n{close}\n\n{rest}")
        pairs = len(template.control_ids(extra)) % 2 == 0
        closed = extra.endswith(close) or (extra.endswith(">") and (pairs or extra in text))
        return prompt + rest.removeprefix(close) if closed and not reasoning else text
    cue = (prompt[len(asked) :] if prompt.startswith(asked) else "") or template.last_control(prompt)
    others = (
        [*turns[:-2], {**turns[-2], "content": "zq"}, turns[-1]],
        [*turns[:-1], {"role": "assistant", "content": "zq"}],
    )
    asked_from, answered_from = (len(os.path.commonprefix([text, write(other, False)])) for other in others)
    at = text.rfind(cue, asked_from, answered_from)
    return prompt + text[at + len(cue) :] if cue and at >= 0 else text
