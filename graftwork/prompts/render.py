"""The one prompt builder: training, serving, retrieval and evaluation all render a conversation here.

A conversation becomes token ids by the base's own chat template (jinja) and tokenizer (`tokenizer.json`). Text that
comes from people or passages can never become a control token.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from graftwork.config import Spec
from graftwork.errors import DataError
from graftwork.prompts.capabilities import Turn, written_call
from graftwork.prompts.mask import TokenisedText, loss_mask
from graftwork.prompts.template import Template
from graftwork.prompts.turns import answer_behind, apply_thinking, check_calls, template_variables, turns_of

_CITATION = re.compile(r"\[(\d{1,4})\]")

_INSTRUCTIONS = ("system", "developer")
Role = Literal["system", "developer", "user", "assistant", "tool"]
Thinking = Literal["keep", "mask", "drop"]
"""Reasoning of an answer: learned as the template writes it, in the text without loss, or left out of the text."""
Tool = Mapping[str, Any]
"""A function in OpenAI's form: `{"type": "function", "function": {"name", "description", "parameters"}}`."""


def _function_text(value: Any) -> str:
    """Return the JSON text of a function. Raises ValueError for something else."""
    tool = json.loads(value) if isinstance(value, str) else value
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            'a function is {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
        )
    return json.dumps(tool, ensure_ascii=False)


FunctionText = Annotated[str, BeforeValidator(_function_text)]
"""A function as JSON text, read from an object or its text: the order of keys is part of the prompt."""


def without_unset(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave `tools` and `chat_template_kwargs` out where they are empty: older specs keep their digests."""
    return {name: value for name, value in fields.items() if name not in ("tools", "chat_template_kwargs") or value}


class PromptSpec(Spec):
    """Text around the question: a system prompt and worked examples."""

    system: str | None = None
    """System turn; null leaves what the base's template does without one (SmolLM2 adds its own)."""
    shots: int = Field(default=0, ge=0, le=64)
    """Few-shot examples shown before the question: the first rows of `few_shot_file`."""
    few_shot_file: str | None = None
    """JSONL of training rows: a path, `file://`, `s3://` or `recipe://NAME/train.jsonl`."""
    context_header: str = "Context:"
    """Line above the retrieved passages in the last user turn."""
    citations: bool = False
    """Number the passages, `[1]`, `[2]`, so that an answer can cite them; the system prompt says that it should."""
    tools: tuple[FunctionText, ...] = ()
    """Functions that the assistant may call, in OpenAI's form; a row's `tools` replace them."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking` or `reasoning_effort`; a row's own win."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self))

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.shots and self.few_shot_file is None:
            raise ValueError(f"shots={self.shots} needs few_shot_file, the rows that they are taken from")
        if self.few_shot_file is not None and not self.shots:
            raise ValueError("few_shot_file is set but shots is 0, so it cannot take effect")
        return self


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant turn."""

    name: str
    arguments: Mapping[str, Any]
    """JSON object."""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a turn of role tool: the call that it answers."""
    name: str | None = None
    """Of a turn of role tool: the function. Else the name of the speaker, where the template reads one."""
    reasoning: str | None = None
    """Text before the answer, apart from it (`reasoning_content`)."""
    trained: bool = True
    """False: no loss on this turn (OpenAI's `weight: 0`)."""
    thinking: Thinking | None = None
    """Of this turn; None takes the dataset's."""


def message_fields(message: Message) -> dict[str, Any]:
    """Return a turn in OpenAI's form: role, content, and the other keys where they are set."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            written_call(call.name, json.dumps(call.arguments, ensure_ascii=False), call.id)
            for call in message.tool_calls
        ]
    optional = {
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "reasoning_content": message.reasoning,
    }
    return fields | {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text of a corpus."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A resolved `PromptSpec` (see `graftwork.datasets.rows.resolve_prompt`): the worked examples are read."""

    system: str | None = None
    shots: tuple[tuple[Message, Message], ...] = ()
    context_header: str = "Context:"
    citations: bool = False
    tools: tuple[Tool, ...] = ()
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it. `loss_mask` is as long as `ids`, all False in a prompt."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    stop_ids: frozenset[int]


_NO_PROMPT = Prompt()


def render(
    messages: Sequence[Message],
    template: Template,
    *,
    prompt: Prompt = _NO_PROMPT,
    context: Sequence[Passage] = (),
    tools: Sequence[Tool] = (),
    template_kwargs: Mapping[str, Any] | None = None,
    thinking: Thinking = "keep",
    generate: bool,
) -> Rendered:
    """Return the conversation as ids: a prompt that asks for an answer (`generate`), or a row to train on.

    The ids of a prompt are a prefix of the ids of every conversation that it grows into: text is tokenised in segments
    that end where answers begin. Where tokenising the whole merges nothing across a cut, the ids equal transformers'.
    A system turn in `messages` wins over the prompt's, `tools` over the prompt's, each of `template_kwargs` over the
    prompt's of that name. Raises DataError (turns out of order, something that the template would leave out, an unknown
    variable), BaseModelError (a template that is untrainable, or that writes no calls).
    """
    check_calls(messages)
    conversation, first_own = _assemble(messages, prompt, context, thinking, template)
    functions = tuple(tools) or prompt.tools
    variables = template_variables(template, prompt.template_kwargs, template_kwargs)
    first = len(conversation) - len(messages)
    turns = turns_of(conversation, template, functions, first)

    def write(some: Sequence[Turn], asks: bool) -> str:
        return template.sealed_text(some, generate=asks, tools=functions, variables=variables)

    prompts = {at: write(turns[:at], True) for at, one in enumerate(conversation) if one.role == "assistant"}
    last, text = len(turns) - 1, write(turns, generate)
    _check_last(conversation, len(messages), generate)
    if not generate:
        reasoning = (conversation[last].reasoning or "").strip()
        text = answer_behind(prompts[last], text, turns, reasoning, template, write)
        closing = template.closing(calls=bool(conversation[last].tool_calls))
        text += "" if text.endswith(closing) else closing
    tokens = TokenisedText(template, spans=any(one.thinking == "mask" for one in conversation))
    starts = {at: tokens.extend_to(asked) for at, asked in prompts.items() if text.startswith(asked)}
    tokens.extend_to(text)
    if generate:
        return Rendered(tuple(tokens.ids), (False,) * len(tokens.ids), template.stop_ids)
    with_tools = bool(functions) or any(one.tool_calls for one in conversation)
    own = [at for at in prompts if at >= first_own and conversation[at].trained]
    learned = own if template.prefix_holds(tools=with_tools, variables=variables) else [at for at in own if at == last]
    return Rendered(
        tuple(tokens.ids), loss_mask(tokens, starts, learned, conversation, first, template), template.stop_ids
    )


def training_rows(
    messages: Sequence[Message],
    template: Template,
    *,
    prompt: Prompt = _NO_PROMPT,
    tools: Sequence[Tool] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[Message, ...]]:
    """The conversation itself, or one row a turn where the template lacks the prefix property.

    prompt, tools, template_kwargs: as in `render`. Raises DataError where no turn is learned.
    """
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise DataError("messages", "no turn of the assistant is learned", "weight 0 leaves one turn or more to learn")
    with_tools = bool(tools or prompt.tools) or any(message.tool_calls for message in messages)
    variables = template_variables(template, prompt.template_kwargs, template_kwargs)
    holds = template.prefix_holds(tools=with_tools, variables=variables)
    return [tuple(messages)] if holds else one_turn_rows(messages)


def one_turn_rows(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """One row per assistant turn that is learned, each ending with it."""
    ends = (end for end, message in enumerate(messages, start=1) if message.role == "assistant" and message.trained)
    return [tuple(messages[:end]) for end in ends]


def format_user_turn(question: str, context: Sequence[Passage], header: str, citations: bool = False) -> str:
    """Return a user turn with its passages: one a line, an empty line, the question."""
    return _context_block(context, header, citations) + "\n\n" + question


def fit_passages(
    context: Sequence[Passage], template: Template, prompt: Prompt, max_tokens: int | None
) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
    """Return (passages that fit, passages left out): the best first as far as the room goes, each one whole.

    The room is what the lines of the passages take, the header with them. A long passage that does not fit makes
    room for a shorter one behind it.
    """
    if max_tokens is None:
        return tuple(context), ()
    kept: list[Passage] = []
    for passage in context:
        block = _context_block([*kept, passage], prompt.context_header, prompt.citations)
        if len(template.encode(block)) <= max_tokens:
            kept.append(passage)
    return tuple(kept), tuple(passage for passage in context if passage not in kept)


def cited_passage_ids(text: str, context_ids: Sequence[str]) -> tuple[str, ...]:
    """Ids of the passages that an answer cites as `[1]`, in the order of the passages; other numbers cite nothing."""
    numbers = {int(number) for number in _CITATION.findall(text)}
    return tuple(identity for number, identity in enumerate(context_ids, start=1) if number in numbers)


def rerank_prompt(passage: Passage) -> tuple[Message, ...]:
    """The prompt behind which the likelihood of a question says how well the passage answers it."""
    return (Message("user", f"{' '.join(passage.text.split())}\n\nWrite a question that this text answers."),)


def _context_block(context: Sequence[Passage], header: str, citations: bool) -> str:
    marks = (f"[{number}] " if citations else "- " for number in range(1, len(context) + 1))
    lines = (mark + " ".join(passage.text.split()) for mark, passage in zip(marks, context, strict=True))
    return "\n".join([header, *lines])


def _assemble(
    messages: Sequence[Message], prompt: Prompt, context: Sequence[Passage], thinking: Thinking, template: Template
) -> tuple[list[Message], int]:
    """(system, worked examples, conversation with context) and the index of the conversation's first own turn."""
    own = [apply_thinking(message, thinking, template) for message in messages]
    opening = [Message("system", prompt.system)] if prompt.system is not None else []
    if own and own[0].role in _INSTRUCTIONS:
        opening = [own.pop(0)]
    if not any(m.role == "user" for m in own):
        raise DataError("conversation", "it has no user turn", "a conversation has at least one user turn")
    if any(m.role in _INSTRUCTIONS for m in own):
        raise DataError("conversation", "a system turn after the first turn", "the system turn comes first, once")
    asked = max(i for i, m in enumerate(own) if m.role == "user")
    if context:
        text = format_user_turn(own[asked].content, context, prompt.context_header, prompt.citations)
        own[asked] = dataclasses.replace(own[asked], content=text)
    opening += [m for shot in prompt.shots for m in shot]
    return opening + own, len(opening)


def _check_last(conversation: Sequence[Message], count: int, generate: bool) -> None:
    role = conversation[-1].role
    if role not in (("user", "tool") if generate else ("assistant",)):
        wanted = "the user's turn, to be answered" if generate else "the assistant's turn, to be learned"
        raise DataError(f"conversation of {count} turns", f"it ends with {role}", f"the last is {wanted}")
