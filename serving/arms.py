"""Arms by model name, and the prompt of an arm: its examples, passages, the conversation and template as token ids.

A model name is the base, `BASE:task[@ref]` or `arm/NAME`; each means one arm record. Offline comparison, shadow and
live traffic build their prompts here.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, get_args

from graftwork.datasets.rows import DatasetRow, resolve_prompt
from graftwork.errors import ConfigError, DataError
from graftwork.prompts.render import (
    Message,
    Passage,
    Prompt,
    PromptSpec,
    Role,
    ToolCall,
    fit_passages,
    render,
)
from graftwork.prompts.template import Template
from graftwork.retrieval import Retriever, RetrieverSpec, open_retriever
from graftwork.serving.api.errors import AnswerTooLong, ApiError, PromptTooLong, unknown_model
from graftwork.serving.api.openai_protocol import Json, model_card
from graftwork.serving.messages import Question
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import ALIAS_PATTERN

_ADAPTER_ARM = ArmSpec(name="adapter", max_new_tokens=None)
DEFAULT_ALIAS = "latest"
"""`BASE:task` means `BASE:task@latest`."""


def base_name(uri: str) -> str:
    """The base's model name: the last part of its URI, e.g. `SmolLM2.Q4_1` for `pypi://pkg/SmolLM2.Q4_1.gguf`."""
    return PurePosixPath(uri.rstrip("/")).name.removesuffix(".gguf")


class Catalog:
    """Model names of one endpoint, and the arm of each."""

    def __init__(self, spec: ServeSpec) -> None:
        self.base = base_name(spec.base.uri)
        self._embedder = spec.embedder.model_name if spec.embedder else None
        self.changes = 0
        self.take(spec)

    def take(self, spec: ServeSpec) -> None:
        """Answer to these arms from now on."""
        self.changes += 1
        self._named_arms = {f"arm/{arm.name}": arm for arm in spec.arms}
        self._arms = {self.base: spec.base_arm, **self._named_arms}

    def arm(self, model: str) -> ArmSpec:
        """The arm behind a model name. Raises ApiError 404; whether its adapter exists is found out by the replica."""
        arm = self._arms.get(model)
        if arm is not None:
            return arm
        if not model.startswith(f"{self.base}:"):
            raise self._unknown_model(model)
        return _ADAPTER_ARM.model_copy(update={"adapter": self.ref(model)})  # `ref` has checked the one new value

    def ref(self, name: str) -> str:
        """`task@ref` from `task`, `task@ref` or either with `BASE:` before it. Raises ApiError 404 for no such form."""
        task = name.removeprefix(f"{self.base}:")
        ref = task if "@" in task else f"{task}@{DEFAULT_ALIAS}"
        if not re.fullmatch(ALIAS_PATTERN, ref):
            raise self._unknown_model(name)
        return ref

    def require_embedder(self, model: str) -> None:
        """Raises ApiError 404 for any model but the endpoint's embedder."""
        if self._embedder is None:
            raise unknown_model(model, "This endpoint has no embedder: its spec names one as `embedder:`.")
        if model != self._embedder:
            raise unknown_model(model, f"The embedder here: {self._embedder}.")

    def cards(self, adapters: list[Json], created: int) -> list[Json]:
        """GET /v1/models: the base, the arms, each adapter by alias and version (`EngineReplica.models`).

        `created` is for base and arms.
        """
        cards = [model_card(self.base, created)]
        cards += [model_card(self._embedder, created, kind="embedder")] if self._embedder else []
        cards += [model_card(name, created, adapter=arm.adapter) for name, arm in self._named_arms.items()]
        for adapter in adapters:
            task, version, aliases = adapter["task"], adapter["version"], adapter["aliases"]
            names = [f"{self.base}:{task}"] if DEFAULT_ALIAS in aliases else []
            names += [f"{self.base}:{task}@{ref}" for ref in [*aliases, version]]
            stamp = int(datetime.fromisoformat(adapter["created_at"]).timestamp())
            cards += [model_card(name, stamp, adapter=task, adapter_version=version) for name in names]
        return cards

    def forms(self) -> str:
        """The names that models have here, as a sentence."""
        return (
            f"Models here: {', '.join([self.base, f'{self.base}:TASK', f'{self.base}:TASK@ALIAS', *self._named_arms])}."
        )

    def _unknown_model(self, model: str) -> ApiError:
        return unknown_model(model, f"{self.forms()} GET /v1/models lists them all.")


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


def messages_of(turns: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Return messages from mappings of `message_fields`. Raises DataError on another role or content."""
    return tuple(map(_message_of, turns))


def _message_of(turn: Mapping[str, Any]) -> Message:
    if turn.get("role") not in get_args(Role) or not isinstance(turn.get("content"), str):
        roles = ", ".join(get_args(Role))
        raise DataError(f"message {dict(turn)!r}", "", f"a message has a role ({roles}) and text content")
    calls = tuple(
        ToolCall(call["function"]["name"], json.loads(call["function"]["arguments"]), call.get("id"))
        for call in turn.get("tool_calls", ())
    )
    return Message(
        turn["role"],
        turn["content"],
        calls,
        tool_call_id=turn.get("tool_call_id"),
        name=turn.get("name"),
        reasoning=turn.get("reasoning_content"),
    )


def build_prompt(
    arm: ArmSpec,
    question: Question,
    template: Template,
    *,
    max_seq_len: int,
    trained: PromptSpec | None = None,
    max_new_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    passages: Sequence[Passage] | None = None,
) -> ArmPrompt:
    """Return the prompt of one arm: worked examples, retrieved passages, the conversation, the template.

    question: a text is continued as it stands, without arm and template. trained: the prompt that the arm's adapter was
    trained with; used where the arm names none. A system turn of the conversation stands in its place.
    max_new_tokens: overrides the arm's. passages: found ones, best first; None: they are looked for here.
    Raises PromptTooLong; DataError for a conversation that the arm or the template cannot take, or unreadable arm data.
    """
    context: Sequence[Passage] = ()
    left_out: Sequence[Passage] = ()
    if isinstance(question, str):
        prompt, longest = _resolve_prompt(_NO_PROMPT), max_new_tokens
        ids, stop_ids = tuple(template.encode(question)), template.stop_ids
    else:
        if (
            arm.prompt
            and arm.prompt.system is not None
            and any(turn.role in ("system", "developer") for turn in question)
        ):
            raise DataError(
                f"arm {arm.name!r}: a system message",
                "the arm has its own system prompt",
                "an arm is one fixed prompt",
                "leave the system message out",
            )
        prompt, longest = _resolve_prompt(arm.prompt or trained or _NO_PROMPT), max_new_tokens or arm.max_new_tokens
        if arm.retriever:
            found = find(arm, question) if passages is None else passages
            context, left_out = fit_passages(found, template, prompt, arm.retriever.context_tokens)
        rendered = render(
            question,
            template,
            prompt=prompt,
            context=context,
            tools=tuple(map(json.loads, arm.tools)),
            template_kwargs=arm.chat_template_kwargs,
            generate=True,
        )
        ids, stop_ids = rendered.ids, rendered.stop_ids
    longest = longest or max_seq_len - len(ids)
    most = max_seq_len if max_prompt_tokens is None else max_prompt_tokens
    if len(ids) >= max_seq_len or len(ids) + longest > max_seq_len or len(ids) > most:
        raise _too_long(len(ids), longest, max_seq_len, most)
    retrieved, without = (tuple(passage.id for passage in some) for some in (context, left_out))
    return ArmPrompt(ids, stop_ids, retrieved, longest, without, prompt.citations)


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
        _resolve_prompt(prompt)
    if retriever is not None:
        _index(retriever)


def arm_of_row(arm: ArmSpec, row: DatasetRow) -> ArmSpec:
    """The arm with the functions and the template variables of a row, where it has some."""
    changes: dict[str, Any] = {}
    if row.tools:
        changes["tools"] = [dict(tool) for tool in row.tools]
    if row.template_kwargs:
        changes["chat_template_kwargs"] = {**arm.chat_template_kwargs, **row.template_kwargs}
    return arm.with_(changes) if changes else arm


def check_arms(arms: Sequence[ArmSpec], load_template: Callable[[], Template]) -> None:
    """Raise UserError for functions or variables of an arm that the base's chat template does not take.

    The template is loaded only if an arm has some. Those that an adapter was trained with were checked in training.
    """
    asking = [
        arm
        for arm in arms
        if arm.tools
        or arm.chat_template_kwargs
        or (arm.prompt and (arm.prompt.tools or arm.prompt.chat_template_kwargs))
    ]
    template = load_template() if asking else None
    for arm in asking:
        assert template is not None, "loaded for these arms"
        tools, kwargs = tuple(map(json.loads, arm.tools)), arm.chat_template_kwargs
        prompt = _resolve_prompt(arm.prompt or _NO_PROMPT)
        try:
            render(_HELLO, template, prompt=prompt, tools=tools, template_kwargs=kwargs, generate=True)
        except DataError as error:
            raise ConfigError(f"arm {arm.name!r}: {error.subject}", error.problem, error.rule, error.hint) from error


_HELLO = (Message("user", "Hello"),)


def find(arm: ArmSpec, messages: Sequence[Message]) -> tuple[Passage, ...]:
    """Search for the last user turn with the arm's retriever, best first: k passages, or more that will be reranked."""
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


def _too_long(prompt: int, answer: int, max_seq_len: int, max_prompt_tokens: int) -> PromptTooLong:
    rule = f"engine.max_seq_len={max_seq_len}; a prompt is never cut"
    if prompt >= max_seq_len:
        return PromptTooLong(
            f"a prompt of {prompt} tokens",
            "it leaves no room for an answer",
            rule,
            "shorten the conversation, or raise engine.max_seq_len",
        )
    if prompt + answer > max_seq_len:
        return AnswerTooLong(
            f"a prompt of {prompt} tokens with up to {answer} new ones",
            f"{prompt + answer} tokens",
            rule,
            f"ask for at most {max_seq_len - prompt} new tokens, shorten the conversation, or raise engine.max_seq_len",
        )
    return PromptTooLong(
        "a prompt",
        f"{prompt} tokens",
        f"limits.max_prompt_tokens={max_prompt_tokens}",
        "shorten the conversation",
    )


_NO_PROMPT = PromptSpec()


@lru_cache(maxsize=256)
def _resolve_prompt(spec: PromptSpec) -> Prompt:
    return resolve_prompt(spec)


@lru_cache(maxsize=64)
def _index(spec: RetrieverSpec) -> Retriever:
    return open_retriever(spec)
