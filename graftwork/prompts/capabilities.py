"""Abilities of a chat template: functions, calls and their results, reasoning, the end of an answer.

Found by rendering short conversations of words that occur nowhere else. The name of a model family decides nothing.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast, get_args

from graftwork.errors import BaseModelError, DataError

Turn = Mapping[str, Any]
"""A turn as chat templates read it: role, content, and tool_calls, tool_call_id, name, reasoning_content, thinking."""

_ASKED: Turn = {"role": "user", "content": "first question"}
_ANSWER = "plain answer"
_ANSWERED: Turn = {"role": "assistant", "content": _ANSWER}
_FUNCTION, _CALLED, _OTHER = "zq_find", "zq_look", "zq_rank"
_VALUE, _RESULT, _WHY, _NEXT_TO = "zqvalue", "zqresult", "zqreason", "zqtext"
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": _FUNCTION,
        "description": "Look a place up.",
        "parameters": {
            "type": "object",
            "properties": {"zq_key": {"type": "string", "description": "A place."}},
            "required": ["zq_key"],
        },
    },
}
"""Function of the probe conversations. Their calls have other names, so that a call is told from its function."""


class Renderer(Protocol):
    """The part of a `Template` that the probes use."""

    base: str

    def sealed_text(
        self,
        turns: Sequence[Turn],
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] = ...,
        functions_in: "FunctionsPlace | None" = ...,
    ) -> str: ...

    def control_ids(self, sealed: str) -> list[int]: ...


FunctionsPlace = Literal["tools", "xml_tools", "system"]
"""Where a template reads functions: a variable with a list, or the key `tools` of the system turn with JSON text."""


def place_functions(
    turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], place: FunctionsPlace
) -> tuple[Sequence[Turn], dict[str, Any]]:
    """Return turns and variables for functions at that place (SmolLM3: `xml_tools`; Phi-4-mini: system)."""
    if place != "system" or not tools:
        return turns, {"tools": None, place: list(tools) or None} if place != "system" else {"tools": None}
    opening = turns[0] if turns and turns[0]["role"] == "system" else {"role": "system", "content": ""}
    rest = turns[1:] if opening is turns[0] else turns
    return [{**opening, "tools": json.dumps(tools, ensure_ascii=False)}, *rest], {"tools": None}


def find_functions(template: Renderer) -> FunctionsPlace:
    """Return the first place whose functions are in the prompt; `tools` where none are."""
    for place in get_args(FunctionsPlace):
        with contextlib.suppress(DataError):
            if _FUNCTION in template.sealed_text([_ASKED], generate=True, tools=(TOOL,), functions_in=place):
                return cast(FunctionsPlace, place)
    return "tools"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants the calls of a turn."""

    arguments: Literal["object", "text"] = "object"
    """A JSON object, or its text (DeepSeek)."""
    no_content: str | None = ""
    """Content of a turn that has calls alone."""
    short_ids: bool = False
    """Ids have exactly 9 letters and digits (Mistral)."""

    def id_of(self, identity: str | None) -> str | None:
        """Return the id of a call as the template takes it: OpenAI's longer ones by their digest."""
        if identity is None or not self.short_ids or re.fullmatch("[A-Za-z0-9]{9}", identity):
            return identity
        return hashlib.sha256(identity.encode()).hexdigest()[:9]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Abilities of one chat template."""

    end_id: int
    """Token that ends an answer."""
    call_end_id: int
    """Token that ends a turn of calls: of gpt-oss `<|call|>`, mostly `end_id`."""
    closes: bool
    """False: the first token of the next turn ends an answer (GLM), so it is added behind the last one."""
    tools: bool
    """The functions are in the prompt."""
    calls: CallForm | None
    """None: calls and their results are not in the text."""
    calls_need_tools: bool
    """Calls are in the text only where functions are given (a base with a template `tool_use`)."""
    call_ids: bool
    """The id of a call is in the text and its name is not (Kimi)."""
    parallel_calls: bool
    """A turn may have several calls."""
    text_with_calls: bool
    """A turn may have text next to its calls."""
    reasoning: Literal["field", "tags", "opened"] | None
    """Place of reasoning: a field of the turn; `<think>` in its content; none, but the prompt opens it; None: none."""
    reads_tags: bool
    """`<think>` in the content of a turn is read as reasoning."""
    opening: str
    """Sealed text that the generation prompt has and a stored answer has not (DeepSeek-R1's `<think>`)."""
    developer: bool
    """The role developer is known; otherwise it is written as system."""
    names: bool
    """The name of a user's turn is in the text."""


def probe(template: Renderer, source: str, eos_ids: frozenset[int], think: str) -> Capabilities:
    """Render probe conversations. source: text of the template. think: the sealed opening tag of reasoning.

    Raises BaseModelError for a template whose answers have no end; DataError where it refuses question and answer.
    """
    end_id, closes = _end(template, eos_ids)
    tools = _FUNCTION in _text(template, [_ASKED], generate=True, tools=True)
    forms = [CallForm(arguments, empty) for empty in ("", None) for arguments in ("object", "text")]
    calls = next((form for form in forms if _writes_calls(template, form, tools)), None)
    if calls is not None and not _writes_calls(template, calls, tools, identity="call_zq_00000000000000"):
        calls = replace(calls, short_ids=True)
    opening = _opening(template, think)
    reasoning = _place_of_reasoning(template, source, opening)
    return Capabilities(
        end_id=end_id,
        call_end_id=_call_end(template, calls, closes, eos_ids | {end_id}) if calls and tools else end_id,
        closes=closes,
        tools=tools,
        calls=calls,
        calls_need_tools=calls is not None and not any(_writes_calls(template, form, False) for form in forms),
        call_ids=calls is not None and _CALLED not in _text(template, [_ASKED, _called(calls)[0]], tools=tools),
        parallel_calls=calls is not None and _writes_two(template, calls, tools),
        text_with_calls=calls is not None and _writes_text_with_calls(template, calls, tools),
        reasoning=reasoning,
        reads_tags=reasoning == "tags" or (reasoning == "field" and _reads_tags(template)),
        opening=opening,
        developer='"developer"' in source or "'developer'" in source,
        names=_OTHER in _text(template, [{**_ASKED, "name": _OTHER}], generate=True),
    )


def written_call(name: str, arguments: Any, identity: str | None) -> dict[str, Any]:
    """Return a call in the form of OpenAI and transformers. arguments: an object, or its text."""
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if identity is None else {"id": identity, **call}


def _text(template: Renderer, turns: Sequence[Turn], *, generate: bool = False, tools: bool = False) -> str:
    """Text of a probe; empty where the template refuses it."""
    try:
        return template.sealed_text(turns, generate=generate, tools=(TOOL,) if tools else ())
    except DataError:
        return ""


def refusal_of_calls(template: Renderer) -> str:
    """Return the template's own error for a conversation with a call and its result; empty where it renders one."""
    try:
        template.sealed_text([_ASKED, *_called(CallForm()), _ANSWERED], generate=False, tools=(TOOL,))
    except DataError as error:
        return error.problem
    return ""


def _called(form: CallForm, *, parallel: bool = False, text: str = "", identity: str = "zq000000") -> list[Turn]:
    """A turn of calls and a turn a result. Ids have 9 characters, as Mistral's template wants them."""
    arguments: Any = '{"zq_argument": "zqvalue"}' if form.arguments == "text" else {"zq_argument": _VALUE}
    names = (_CALLED, _OTHER) if parallel else (_CALLED,)
    calls = [written_call(name, arguments, f"{identity}{number}") for number, name in enumerate(names)]
    results = [
        {"role": "tool", "content": _RESULT, "tool_call_id": call["id"], "name": call["function"]["name"]}
        for call in calls
    ]
    return [{"role": "assistant", "content": text or form.no_content, "tool_calls": calls}, *results]


def _writes_calls(template: Renderer, form: CallForm, tools: bool, identity: str = "zq000000") -> bool:
    text = _text(template, [_ASKED, *_called(form, identity=identity), _ANSWERED], tools=tools)
    twice_encoded = '\\"zq_argument' in text
    named = _CALLED in text or f"{identity}0" in text
    return named and not twice_encoded and all(word in text for word in (_VALUE, _RESULT, _ANSWER))


def _writes_two(template: Renderer, form: CallForm, tools: bool) -> bool:
    text = _text(template, [_ASKED, *_called(form, parallel=True)], tools=tools)
    return _OTHER in text or "zq0000001" in text


def _writes_text_with_calls(template: Renderer, form: CallForm, tools: bool) -> bool:
    text = _text(template, [_ASKED, *_called(form, text=_NEXT_TO)], tools=tools)
    return _NEXT_TO in text and _VALUE in text


def _end(template: Renderer, eos_ids: frozenset[int]) -> tuple[int, bool]:
    """The first control token behind an answer; True if the template writes it with the answer.

    A token that is there twice ends a part of the answer (Kimi-K3's `<|close|>`).
    """
    whole = template.sealed_text([_ASKED, _ANSWERED], generate=False)
    behind = _behind(whole, _ANSWER)
    if found := template.control_ids(behind):
        return next((token for token in found if found.count(token) == 1), found[0]), True
    longer = template.sealed_text([_ASKED, _ANSWERED, {**_ASKED, "content": "second question"}], generate=False)
    following = template.control_ids(_behind(longer, _ANSWER))[:1]
    if eos_ids.isdisjoint(following):
        raise BaseModelError(
            f"chat template of {template.base}",
            f"it ends an answer with {behind!r}, in which the tokenizer has no special token",
            "an answer ends with a special token, or generation could not stop",
            "add the end token to tokenizer.json as a special one, or use a base whose template and tokenizer belong "
            "together",
        )
    return following[0], False


def _call_end(template: Renderer, form: CallForm, closes: bool, known: frozenset[int]) -> int:
    """The token that ends a turn of calls: a known end, or the last control token of the turn.

    Where the next turn's first token ends an answer, it ends calls too.
    """
    asked, result = [_ASKED, _called(form)[0]], _called(form)[1]
    found = template.control_ids(_behind(_text(template, asked if closes else [*asked, result], tools=True), _VALUE))
    return next((token for token in found if token in known), found[-1] if found else min(known))


def _behind(text: str, word: str) -> str:
    return text[text.rfind(word) + len(word) :] if word in text else ""


def _opening(template: Renderer, think: str) -> str:
    prompt = template.sealed_text([_ASKED], generate=True)
    whole = template.sealed_text([_ASKED, _ANSWERED], generate=False)
    at = prompt.rfind(think)
    opens = at >= 0 and whole.startswith(prompt[:at]) and not whole.startswith(prompt[: at + len(think)])
    return prompt[at:] if opens else ""


_IN_FIELD = {**_ANSWERED, "reasoning_content": _WHY, "thinking": _WHY}
_IN_TAGS = {**_ANSWERED, "content": f"<think>\n{_WHY}\n</think>\n\n{_ANSWER}"}


def _reads_tags(template: Renderer) -> bool:
    return _text(template, [_ASKED, _IN_FIELD]) == _text(template, [_ASKED, _IN_TAGS])


def _place_of_reasoning(template: Renderer, source: str, opening: str) -> Literal["field", "tags", "opened"] | None:
    if _WHY in _text(template, [_ASKED, _IN_FIELD]):
        return "field"
    text = _text(template, [_ASKED, _IN_TAGS])
    if "</think>" in source and _WHY in text and not re.search(r"</think>\s*<think>", text):
        return "tags"
    return "opened" if opening else None


def probe_conversation(form: CallForm | None) -> list[Turn]:
    """Three questions with answers, for the prefix property; with a call each where `form` is given.

    The answers have reasoning, because templates like to cut it from earlier turns.
    """
    answers: list[Turn] = [
        {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nfirst answer"},
        {"role": "assistant", "content": "second answer", "reasoning_content": "since", "thinking": "since"},
        {"role": "assistant", "content": "third answer"},
    ]
    questions: list[Turn] = [{"role": "user", "content": f"{word} question"} for word in ("first", "second", "third")]
    steps = [] if form is None else _called(form)
    rows = ([question, *steps, answer] for question, answer in zip(questions, answers, strict=True))
    return list(itertools.chain.from_iterable(rows))
