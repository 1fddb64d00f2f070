"""An arm record and a conversation become a prompt here: one code for offline comparison, shadow and live traffic."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from graftwork.datasets.rows import resolve_prompt
from graftwork.errors import DataError
from graftwork.prompts import render as chat
from graftwork.prompts.render import Message, Passage, Prompt, PromptSpec
from graftwork.prompts.template import Template
from graftwork.retrieval import Retriever, RetrieverSpec, open_retriever
from graftwork.serving.detokenize import TokenLogprob
from graftwork.serving.engine.grammar import GrammarText
from graftwork.serving.engine.request import SamplingParams
from graftwork.serving.engine.sequence import choice_seed
from graftwork.serving.spec import ArmSpec

Dump = dict[str, Any]
"""A record as a plain dict, the form that travels through a handle."""
Question = Sequence[Mapping[str, str]] | str
"""Messages with role and content, or a text to be continued without a chat template."""


class PromptTooLong(DataError):
    """The prompt leaves no room for an answer in the longest sequence. Nothing is ever cut."""


class AnswerTooLong(PromptTooLong):
    """The prompt fits, but not together with the longest answer that was asked for."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What a caller may choose per request, as `SamplingParams` names it; None for `max_new_tokens`: the arm's."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    n: int = 1
    """Answers to give; each has a seed of its own, made from `seed`."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the base's own."""
    ignore_eos: bool = False
    """The base's own stop tokens end nothing."""
    grammar: GrammarText | None = None
    idle_only: bool = False
    """Shadow traffic: computed only while no other request is."""
    max_prompt_tokens: int | None = None
    """The endpoint's limit when the request was admitted; a longer prompt is refused."""
    cache_salt: str = ""
    """The API key's name: prompts of another are no hit in the prefix cache."""

    def params(self, max_new_tokens: int, index: int) -> SamplingParams:
        """For one of the `n` answers."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=choice_seed(self.seed, index),
            stop=self.stop,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            min_new_tokens=self.min_new_tokens,
            logprobs=self.logprobs,
        )

    def dump(self) -> Dump:
        """As a plain dict, the form that travels through a handle."""
        return asdict(self)

    @classmethod
    def load(cls, tree: Mapping[str, Any]) -> "SamplingOptions":
        """From `dump`."""
        lists = {key: tuple(tree.get(key, ())) for key in ("stop", "stop_ids")}
        bias = tuple((token, value) for token, value in tree.get("logit_bias", ()))
        grammar = GrammarText(**tree["grammar"]) if tree.get("grammar") else None
        return cls(**{**tree, **lists, "logit_bias": bias, "grammar": grammar})


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


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """What came back, and everything that decides whether two answers may be compared."""

    request_id: str
    arm: str
    text: str
    adapter: str | None
    """Task of the adapter; None is the base."""
    adapter_version: str | None
    base_digest: str
    retrieved_ids: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    completion_tokens: int
    ttft_ms: float
    """From the call's arrival at the replica to the first token, adapter load and retrieval included."""
    latency_ms: float
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    index: int = 0
    """Which of the request's answers this is."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the tokens that the text is made of; None: not asked for."""
    cold: bool = False
    """The adapter was loaded for this request, or while it came: its times say nothing of the arm."""
    left_out_ids: tuple[str, ...] = ()
    """Passages that were found and did not fit `retriever.context_tokens`."""
    cited_ids: tuple[str, ...] = ()
    """Passages that the text cites, where the arm's prompt numbers them."""

    def dump(self) -> Dump:
        """As a plain dict, the form that travels through a handle."""
        return asdict(self)

    @classmethod
    def load(cls, tree: Mapping[str, Any]) -> "ArmAnswer":
        """From `dump`, or from its JSON."""
        lists = {key: tuple(tree[key]) for key in ("retrieved_ids", "token_ids", "left_out_ids", "cited_ids")}
        told = tree.get("logprobs")
        logprobs = None if told is None else tuple(TokenLogprob.load(one) for one in told)
        return cls(**{**tree, **lists, "logprobs": logprobs})


def messages_of(dumps: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    """Messages from plain dicts with `role` and `content`. Raises DataError on another role."""
    for turn in dumps:
        if turn.get("role") not in ("system", "user", "assistant") or not isinstance(turn.get("content"), str):
            raise DataError(
                f"message {dict(turn)!r}", "", "a message has a role (system, user, assistant) and text content"
            )
    return tuple(Message(turn["role"], turn["content"]) for turn in dumps)  # type: ignore[arg-type]  # checked above


def build_prompt(
    arm: ArmSpec,
    messages: Sequence[Message],
    template: Template,
    *,
    max_seq_len: int,
    trained: PromptSpec | None = None,
    max_new_tokens: int | None = None,
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
    _check_length(len(rendered.ids), limit, max_seq_len)
    ids, left_out_ids = (tuple(passage.id for passage in some) for some in (context, left_out))
    return ArmPrompt(rendered.ids, rendered.stop_ids, ids, limit, left_out_ids, prompt.citations)


def raw_prompt(text: str, template: Template, *, max_seq_len: int, max_new_tokens: int | None) -> ArmPrompt:
    """Plain text to be continued, without a chat template. Raises PromptTooLong."""
    ids = tuple(template.encode(text))
    limit = max_new_tokens or max_seq_len - len(ids)
    _check_length(len(ids), limit, max_seq_len)
    return ArmPrompt(ids, template.stop_ids, (), limit)


def require_short(prompt: ArmPrompt, max_prompt_tokens: int | None) -> None:
    """Raise PromptTooLong for more prompt tokens than the endpoint takes."""
    if max_prompt_tokens is not None and len(prompt.ids) > max_prompt_tokens:
        raise PromptTooLong(
            "a prompt",
            f"{len(prompt.ids)} tokens",
            f"limits.max_prompt_tokens={max_prompt_tokens}",
            "shorten the conversation",
        )


def size_of(question: Question) -> int:
    """UTF-8 bytes of its texts."""
    texts = [question] if isinstance(question, str) else [str(turn.get("content", "")) for turn in question]
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
        return _resolved(trained or PromptSpec())
    prompt = _resolved(arm.prompt)
    if prompt.system is not None and any(turn.role == "system" for turn in messages):
        raise DataError(
            f"arm {arm.name!r}: a system message",
            "the arm has its own system prompt",
            "an arm is one fixed prompt",
            "leave the system message out",
        )
    return prompt


def _check_length(prompt: int, answer: int, max_seq_len: int) -> None:
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


@lru_cache(maxsize=256)
def _resolved(spec: PromptSpec) -> Prompt:
    return resolve_prompt(spec)


@lru_cache(maxsize=64)
def _index(spec: RetrieverSpec) -> Retriever:
    return open_retriever(spec)
