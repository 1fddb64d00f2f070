"""The one prompt builder: training, serving, retrieval and evaluation all render a conversation here.

A conversation becomes token ids by the base's own chat template (jinja) and tokenizer (`tokenizer.json`). Text that
comes from people or passages can never become a control token.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.errors import BaseModelError, DataError
from graftwork.prompts.template import Template, Turn

_CITATION = re.compile(r"\[(\d{1,4})\]")

Role = Literal["system", "developer", "user", "assistant", "tool"]
Thinking = Literal["keep", "mask", "drop"]
"""Reasoning of an answer: learned as the template writes it, in the text without loss, or left out of the text."""
Tool = Mapping[str, Any]
"""A function in OpenAI's form: `{"type": "function", "function": {"name", "description", "parameters"}}`."""


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


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it. `loss_mask` is as long as `ids`, all False in a prompt."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    stop_ids: frozenset[int]


_NO_PROMPT = Prompt()
_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


def render(
    messages: Sequence[Message],
    template: Template,
    *,
    prompt: Prompt = _NO_PROMPT,
    context: Sequence[Passage] = (),
    tools: Sequence[Tool] = (),
    template_kwargs: Mapping[str, Any] = _NO_KWARGS,
    thinking: Thinking = "keep",
    generate: bool,
) -> Rendered:
    """Return the conversation as ids: a prompt that asks for an answer (`generate`), or a row to train on.

    The ids of a prompt are a prefix of the ids of every conversation that it grows into: text is tokenised in segments
    that end where answers begin. Where tokenising the whole merges nothing across a cut, the ids equal transformers'.
    A system turn in `messages` wins over the prompt's. Raises DataError (turns out of order), BaseModelError
    (untrainable template).
    """
    if tools or template_kwargs or thinking != "keep":
        raise DataError("conversation", "tools, template variables and thinking are not rendered yet")
    turns, first_own = _assemble(messages, prompt, context)
    if turns[-1][0] != ("user" if generate else "assistant"):
        wanted = "the user's turn, to be answered" if generate else "the assistant's turn, to be learned"
        raise DataError(
            f"conversation of {len(messages)} turns", f"it ends with {turns[-1][0]}", f"the last is {wanted}"
        )
    text = template.sealed_text(turns, generate=generate)
    ids: list[int] = []
    done = ""
    starts: dict[int, int] = {}
    for turn in [*(turn for turn, (role, _) in enumerate(turns) if role == "assistant"), None]:
        upto = text if turn is None else template.sealed_text(turns[:turn], generate=True)
        if not text.startswith(upto):
            continue
        whole = template.sealed_ids(upto)
        ids = whole if whole[: len(ids)] == ids else ids + template.continuation_ids(upto[len(done) :])
        done = upto
        if turn is not None:
            starts[turn] = len(ids)
    mask = (False,) * len(ids) if generate else _loss_mask(ids, starts, len(turns) - 1, first_own, template)
    return Rendered(tuple(ids), mask, template.stop_ids)


def training_rows(messages: Sequence[Message], template: Template) -> list[tuple[Message, ...]]:
    """The conversation itself, or one row a turn where the template lacks the prefix property."""
    return [tuple(messages)] if template.has_prefix_property else one_turn_rows(messages)


def one_turn_rows(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """One row per assistant turn, each ending with it."""
    return [tuple(messages[: end + 1]) for end, message in enumerate(messages) if message.role == "assistant"]


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


def _assemble(messages: Sequence[Message], prompt: Prompt, context: Sequence[Passage]) -> tuple[list[Turn], int]:
    """(system, worked examples, conversation with context) and the index of the conversation's first own turn."""
    if not messages or all(m.role == "system" for m in messages):
        raise DataError("conversation", "it has no user turn", "a conversation has at least one user turn")
    own = list(messages)
    system = own.pop(0).content if own[0].role == "system" else prompt.system
    if any(m.role == "system" for m in own):
        raise DataError("conversation", "a system turn after the first turn", "the system turn comes first, once")
    asked = max((i for i, m in enumerate(own) if m.role == "user"), default=None)
    if asked is None:
        raise DataError("conversation", "it has no user turn", "a conversation has at least one user turn")
    if context:
        text = format_user_turn(own[asked].content, context, prompt.context_header, prompt.citations)
        own[asked] = Message("user", text)
    opening: list[Turn] = [] if system is None else [("system", system)]
    opening += [(m.role, m.content) for shot in prompt.shots for m in shot]
    return opening + [(m.role, m.content) for m in own], len(opening)


def _loss_mask(
    ids: Sequence[int], starts: Mapping[int, int], last: int, first_own: int, template: Template
) -> tuple[bool, ...]:
    """Mark each own answer from behind the generation prompt up to and including the token that ends its turn.

    Only the last answer counts where the template lacks the prefix property. starts: first token by answered turn.
    """
    if last not in starts:
        raise BaseModelError(
            "chat template of the base",
            "its generation prompt is not how it writes an answer",
            "an answer is learned right behind the prompt that asks for it",
            "train on another base, or fix its chat_template.jinja",
        )
    mask = [False] * len(ids)
    for turn in starts if template.has_prefix_property else [last]:
        if turn >= first_own:
            end = _end_of_turn(ids, starts[turn], template.stop_ids)
            mask[starts[turn] : end] = [True] * (end - starts[turn])
    return tuple(mask)


def _end_of_turn(ids: Sequence[int], start: int, stop_ids: frozenset[int]) -> int:
    """Index behind the first stop token from `start` on."""
    for index in range(start, len(ids)):
        if ids[index] in stop_ids:
            return index + 1
    raise BaseModelError(
        "chat template of the base",
        "an answer in the middle of a conversation has no end token",
        "every answer ends with a stop token",
        "fix its chat_template.jinja",
    )
