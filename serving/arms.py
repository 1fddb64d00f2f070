"""Prompt of an arm: worked examples, retrieved passages, the conversation and the template become token ids.

Offline comparison, shadow and live traffic build their prompts here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from graftwork.datasets.rows import resolve_prompt
from graftwork.errors import DataError
from graftwork.prompts import render as chat
from graftwork.prompts.render import Message, Passage, Prompt, PromptSpec
from graftwork.prompts.template import Template
from graftwork.retrieval import Retriever, RetrieverSpec, open_retriever
from graftwork.serving.messages import Question
from graftwork.serving.spec import ArmSpec


class PromptTooLong(DataError):
    """The prompt leaves no room for an answer in the longest sequence. Nothing is ever cut."""


class AnswerTooLong(PromptTooLong):
    """The prompt fits, but not together with the longest answer that was asked for."""


@dataclass(frozen=True, slots=True)
class ArmPrompt:
    """A conversation as one arm puts it to the model."""

    ids: tuple[int, ...]
    stop_ids: frozenset[int]
    retrieved_ids: tuple[str, ...]
    """Passages in the prompt, best first."""
    max_new_tokens: int
    left_out_ids: tuple[str, ...] = ()
    """Passages that were found and did not fit `retriever.context_tokens`."""
    citations: bool = False
    """The passages are numbered."""


def messages_of(turns: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    """Return messages from mappings with `role` and `content`, as JSON has them. Raises DataError on another role."""
    for turn in turns:
        if turn.get("role") not in ("system", "user", "assistant") or not isinstance(turn.get("content"), str):
            raise DataError(
                f"message {dict(turn)!r}", "", "a message has a role (system, user, assistant) and text content"
            )
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)  # type: ignore[arg-type]  # checked above


def build_prompt(
    arm: ArmSpec,
    messages: Sequence[Message],
    template: Template,
    *,
    max_seq_len: int,
    trained: PromptSpec | None = None,
    max_new_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    passages: Sequence[Passage] | None = None,
) -> ArmPrompt:
    """The prompt of one arm: worked examples, retrieved passages, the conversation, the template.

    trained: the prompt that the arm's adapter was trained with; used where the arm names none. A system turn of the
    conversation stands in its place. max_new_tokens: overrides the arm's.
    passages: what was found, best first; None: it is looked for here.
    Raises PromptTooLong; DataError for a conversation that the arm or the template cannot take, or unreadable arm data.
    """
    prompt = _prompt_of(arm, messages, trained)
    found = find(arm, messages) if passages is None else passages
    room = arm.retriever.context_tokens if arm.retriever else None
    context, left_out = chat.fit_passages(found, template, prompt, room)
    rendered = chat.render(messages, template, prompt=prompt, context=context, generate=True)
    limit = max_new_tokens or arm.max_new_tokens or max_seq_len - len(rendered.ids)
    _check_length(len(rendered.ids), limit, max_seq_len, max_prompt_tokens)
    ids, left_out_ids = (tuple(passage.id for passage in some) for some in (context, left_out))
    return ArmPrompt(rendered.ids, rendered.stop_ids, ids, limit, left_out_ids, prompt.citations)


def raw_prompt(
    text: str,
    template: Template,
    *,
    max_seq_len: int,
    max_new_tokens: int | None,
    max_prompt_tokens: int | None = None,
) -> ArmPrompt:
    """Plain text to be continued, without a chat template. Raises PromptTooLong."""
    ids = tuple(template.encode(text))
    limit = max_new_tokens or max_seq_len - len(ids)
    _check_length(len(ids), limit, max_seq_len, max_prompt_tokens)
    return ArmPrompt(ids, template.stop_ids, (), limit)


def size_of(question: Question) -> int:
    """Return the UTF-8 bytes of its texts."""
    texts = [question] if isinstance(question, str) else [turn.content for turn in question]
    return sum(len(text.encode()) for text in texts)


def require_bytes(size: int, longest_token_bytes: int, max_seq_len: int) -> None:
    """Raise PromptTooLong for more bytes than `max_seq_len` of the longest token hold.

    Takes a millisecond for 4 MB; searching, rendering and tokenising such a text takes seconds of CPU.
    """
    room = max_seq_len * longest_token_bytes
    if size > room:
        raise PromptTooLong(
            f"a prompt of {size} bytes",
            f"{max_seq_len} tokens hold at most {room} bytes",
            f"engine.max_seq_len={max_seq_len}; a prompt is never cut",
            "shorten the conversation, or raise engine.max_seq_len",
        )


def warm(prompt: PromptSpec | None, retriever: RetrieverSpec | None) -> None:
    """Read the worked examples and open the index now, before a request needs them. Raises DataError, StorageError."""
    if prompt is not None:
        _resolved(prompt)
    if retriever is not None:
        _index(retriever)


def find(arm: ArmSpec, messages: Sequence[Message]) -> tuple[Passage, ...]:
    """What the arm's retriever finds for the last user turn, best first: k passages, or more that will be reranked."""
    if arm.retriever is None:
        return ()
    rerank = arm.retriever.rerank
    wanted = rerank.candidates if rerank else arm.retriever.k
    return tuple(hit.passage for hit in _index(arm.retriever).search(query_of(arm, messages), wanted))


def query_of(arm: ArmSpec, messages: Sequence[Message]) -> str:
    """The last user turn, which is the search query. Raises DataError where there is none."""
    question = next((turn.content for turn in reversed(messages) if turn.role == "user"), None)
    if question is None:
        raise DataError(
            f"arm {arm.name!r}", "the conversation has no user turn", "the last user turn is the search query"
        )
    return question


def _prompt_of(arm: ArmSpec, messages: Sequence[Message], trained: PromptSpec | None) -> Prompt:
    if arm.prompt is None:
        return _resolved(trained or _NO_PROMPT)
    prompt = _resolved(arm.prompt)
    if prompt.system is not None and any(turn.role == "system" for turn in messages):
        raise DataError(
            f"arm {arm.name!r}: a system message",
            "the arm has its own system prompt",
            "an arm is one fixed prompt",
            "leave the system message out",
        )
    return prompt


def _check_length(prompt: int, answer: int, max_seq_len: int, max_prompt_tokens: int | None) -> None:
    if prompt >= max_seq_len:
        raise PromptTooLong(
            f"a prompt of {prompt} tokens",
            "it leaves no room for an answer",
            f"engine.max_seq_len={max_seq_len}; a prompt is never cut",
            "shorten the conversation, or raise engine.max_seq_len",
        )
    if prompt + answer > max_seq_len:
        raise AnswerTooLong(
            f"a prompt of {prompt} tokens with up to {answer} new ones",
            f"{prompt + answer} tokens",
            f"engine.max_seq_len={max_seq_len}; a prompt is never cut",
            f"ask for at most {max_seq_len - prompt} new tokens, shorten the conversation, or raise engine.max_seq_len",
        )
    if max_prompt_tokens is not None and prompt > max_prompt_tokens:
        raise PromptTooLong(
            "a prompt",
            f"{prompt} tokens",
            f"limits.max_prompt_tokens={max_prompt_tokens}",
            "shorten the conversation",
        )


_NO_PROMPT = PromptSpec()


@lru_cache(maxsize=256)
def _resolved(spec: PromptSpec) -> Prompt:
    return resolve_prompt(spec)


@lru_cache(maxsize=64)
def _index(spec: RetrieverSpec) -> Retriever:
    return open_retriever(spec)
