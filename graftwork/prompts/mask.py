"""Token ids of a rendered conversation, and the loss mask over them."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graftwork.errors import BaseModelError, DataError
from graftwork.prompts.turns import reasoning_of

if TYPE_CHECKING:
    from graftwork.prompts.render import Message
    from graftwork.prompts.template import Template


class TokenisedText:
    """Sealed text as ids, tokenised in segments: the ids of a beginning stay when text is added."""

    def __init__(self, template: "Template", *, spans: bool) -> None:
        """spans: the characters of each token are needed too."""
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []
        """Characters [start, end) of each token, where asked for."""
        self.text = ""
        self._template, self._with_spans = template, spans

    def extend_to(self, text: str) -> tuple[int, int]:
        """Go on to a longer text; returns its tokens and characters."""
        whole = self._template.sealed_ids(text)
        if continues := whole[: len(self.ids)] != self.ids:
            self.ids += self._template.continuation_ids(text[len(self.text) :])
        else:
            self.ids = whole
        if self._with_spans:
            before = len(self.text) if continues else 0
            found = self._template.token_spans(text[before:], continues=continues)
            self.spans = [*(self.spans if continues else ()), *((a + before, b + before) for a, b in found)]
        self.text = text
        return len(self.ids), len(text)


def loss_mask(
    tokens: TokenisedText,
    starts: Mapping[int, tuple[int, int]],
    learned: Sequence[int],
    conversation: Sequence["Message"],
    first: int,
    template: "Template",
) -> tuple[bool, ...]:
    """Mark each learned answer from behind the generation prompt up to and including the token that ends its turn.

    starts: tokens and characters before each answer that stands behind its prompt. learned: turns of the loss.
    first: place of the row's `messages[0]` in the conversation, for errors.
    """
    mask = [False] * len(tokens.ids)
    for turn in learned:
        where = f"messages[{turn - first}]"
        if turn not in starts:
            raise _no_start(where, conversation[turn], template)
        start, characters = starts[turn]
        end = _end_of_turn(tokens.ids, start, template)
        mask[start:end] = [True] * (end - start)
        _check_calls(tokens.ids[start:end], conversation[turn], where, template)
        following = [at for _, at in starts.values() if at > characters]
        reasoning = _place_of_reasoning(
            tokens.text, (characters, min(following, default=None)), conversation[turn], where, template
        )
        if reasoning and conversation[turn].thinking == "mask":
            for index in range(start, end):
                first, behind = tokens.spans[index]
                mask[index] = not (first < reasoning[1] and behind > reasoning[0])
    return tuple(mask)


def _no_start(where: str, message: "Message", template: "Template") -> BaseModelError:
    hint = "train on another base, or fix its chat_template.jinja"
    if reasoning_of(message)[0]:
        hint = f"set data.thinking=drop, or {_variable_hint(template)}"
    elif known := _reasoning_variables(template):
        hint = (
            f"set a variable of prompt.chat_template_kwargs for answers without reasoning (the template reads {known})"
        )
    return BaseModelError(
        f"chat template of {template.base}",
        f"its generation prompt is not how it writes the answer of {where}",
        "an answer is learned right behind the prompt that asks for it",
        hint,
    )


def _variable_hint(template: "Template") -> str:
    if known := _reasoning_variables(template):
        return f"a variable of prompt.chat_template_kwargs that keeps it (the template reads {known})"
    return "write it into the content of the turn"


def _reasoning_variables(template: "Template") -> str:
    return ", ".join(name for name in sorted(template.variables) if re.search("think|thought|reason", name))


def _check_calls(learned: Sequence[int], message: "Message", where: str, template: "Template") -> None:
    """Raise DataError for a call that is not in the learned ids of its turn."""
    text = template.decode(learned, skip_special=False) if message.tool_calls else ""
    for call in message.tool_calls:
        if call.name not in text and (call.id is None or call.id not in text):
            rule = "a call is learned as the template of the base writes it"
            problem = f"the chat template of {template.base} leaves the call of {call.name!r} out of this turn"
            raise DataError(f"{where}.tool_calls", problem, rule, "set base.chat_template=hermes")


def _place_of_reasoning(
    text: str, span: tuple[int, int | None], message: "Message", where: str, template: "Template"
) -> tuple[int, int] | None:
    """Characters [start, end) of the reasoning in the span of a turn. Raises DataError where it is left out."""
    reasoning = (reasoning_of(message)[0] or "").strip()
    if not reasoning:
        return None
    at = text.find(reasoning, *span)
    if at < 0:
        raise DataError(
            f"{where}.reasoning_content",
            f"the chat template of {template.base} leaves it out of this turn",
            "reasoning is learned as the template of the base writes it",
            f"set data.thinking=drop, or {_variable_hint(template)}",
        )
    return at, at + len(reasoning)


def _end_of_turn(ids: Sequence[int], start: int, template: "Template") -> int:
    """Index behind the first stop token from `start` on."""
    for index in range(start, len(ids)):
        if ids[index] in template.stop_ids:
            return index + 1
    raise BaseModelError(
        f"chat template of {template.base}",
        "an answer in the middle of a conversation has no end token",
        "every answer ends with a stop token",
        "fix its chat_template.jinja",
    )
