"""Requests and answers in the shape of the OpenAI API; what can't be honoured is refused by name, never ignored.

Shapes: https://platform.openai.com/docs/api-reference/chat. `temperature` defaults to 0 here, not 1: an arm's offline
score is measured greedily, and the live endpoint answers the same way unless the request says otherwise.
"""

import base64
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from graftwork.prompts.render import Message, Role
from graftwork.retrieval.embedder import Embedded
from graftwork.serving.api.errors import bad_request, explain_body, shorten
from graftwork.serving.engine.grammar import GrammarText
from graftwork.serving.engine.request import MAX_TOP_LOGPROBS, MIN_REPETITION_PENALTY, SamplingParams
from graftwork.serving.messages import ArmAnswer, ArmRequest, Question, Spelled, TokenLogprob
from graftwork.serving.spec import ArmSpec

Json = dict[str, Any]
"""A JSON object."""
Text = Annotated[str, Field(min_length=1)]
MAX_TEXTS = 2048
"""OpenAI's own limit of one request."""


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings. Token ids as `input` are refused: send text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Only the embedder's own size: its vectors can't be cut without losing what they mean."""
    user: str | None = None

    def texts(self) -> list[str]:
        """The texts, one or many."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


def embedding_response(body: EmbeddingRequest, found: Embedded) -> Json:
    """Vectors as JSON numbers, or as the base64 of little-endian 32-bit floats. Raises ApiError for `dimensions`."""
    size = found.vectors_BH.shape[1]
    if body.dimensions not in (None, size):
        message = f"dimensions={body.dimensions}: this embedder's vectors have {size} numbers, and can't be cut."
        raise bad_request(message, param="dimensions", code="unsupported_parameter")
    little = found.vectors_BH.astype("<f4")
    vectors = [
        base64.b64encode(row.tobytes()).decode() if body.encoding_format == "base64" else row.tolist() for row in little
    ]
    data = [{"object": "embedding", "index": number, "embedding": vector} for number, vector in enumerate(vectors)]
    usage = {"prompt_tokens": sum(found.tokens), "total_tokens": sum(found.tokens)}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


NEUTRAL: dict[str, object] = {
    "best_of": 1,
    "echo": False,
    "suffix": None,
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": None,
    "audio": None,
    "prediction": None,
    "reasoning_effort": "none",
    "service_tier": "auto",
    "store": False,
    "verbosity": None,
    "web_search_options": None,
    "moderation": None,
}
"""Parameters of the OpenAI API that this endpoint does not serve, each with the value that changes nothing."""

COMPLETION_TOKENS = 16
"""Of an answer on /v1/completions whose length is not asked for, as in the OpenAI API."""
MAX_CHOICES = 128
"""Of one request, as in the OpenAI API."""
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Only such an escape can bring a lone surrogate; encoding each body again to find one costs 15 ms for 4 MB."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """One piece of a message's content."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of the conversation. `developer` is OpenAI's newer name of `system`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: None = None


class StreamOptions(BaseModel):
    """Additions to the text of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    """Ends the stream with a chunk that has the token counts and no choices."""
    include_obfuscation: Literal[False] = False


class _JsonSchema(BaseModel):
    """A schema with its label. It is always enforced whole, so `strict` changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    tree: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Form of the answer: any text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_counts(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema stands with type=json_schema, and only there")
        return self

    def grammar(self) -> GrammarText | None:
        """None: any text."""
        if self.json_schema is not None:  # not canonical JSON: the order of properties is the answer's
            return GrammarText("json_schema", json.dumps(self.json_schema.tree, ensure_ascii=False))
        return GrammarText("json_schema", '{"type":"object"}') if self.type == "json_object" else None


class _Common(BaseModel):
    """Parameters of both kinds of completion."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Longest answer in tokens. Without it: the arm's own limit, or what is left of the sequence."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Extension (`extra_body` of the client): keep the k most probable tokens; 0 keeps all."""
    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    """Extension: drop tokens less probable than this share of the most probable one."""
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[Finite, Field(ge=MIN_REPETITION_PENALTY, le=10)] = 1.0
    """Extension: as in transformers, over prompt and answer."""
    logit_bias: Annotated[dict[str, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    """By token id."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    min_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Extension: no stop token comes before so many tokens."""
    ignore_eos: bool = False
    """Extension: the base's stop tokens end nothing; for measuring."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = []
    """Extension: further tokens that end the answer; they are no part of its text."""
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    """Extension: a regular expression that the whole answer matches (Rust's syntax, no look-around)."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # labels for the provider's books: no answer depends on them
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if any(not text for text in ([stop] if isinstance(stop, str) else stop or [])):
            raise ValueError("a stop string can't be empty")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _biases_are_of_tokens(cls, bias: dict[str, float]) -> dict[str, float]:
        for key in bias:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f"its keys are token ids, found {shorten(key)}")
        if len({int(key) for key in bias}) < len(bias):
            raise ValueError("a token id stands there twice")
        return bias

    @model_validator(mode="after")
    def _options_take_effect(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        grammar = self.response_format.grammar() if self.response_format else None
        if grammar is not None and self.regex is not None:
            raise ValueError("response_format and regex are two grammars; an answer has one")
        if (grammar is not None or self.regex is not None) and (self.ignore_eos or self.min_tokens):
            raise ValueError("ignore_eos and min_tokens contradict a grammar, which alone says when an answer is whole")
        return self


class ChatRequest(_Common):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0

    @model_validator(mode="after")
    def _chat_options_take_effect(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true, or leave it out")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens are two names of one limit and differ here")
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(_Common):
    """Body of POST /v1/completions: the prompt is continued as it stands, without a chat template."""

    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = COMPLETION_TOKENS
    prompt: Annotated[str, Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


def arm_request(
    body: ChatRequest | CompletionRequest,
    arm: ArmSpec,
    request_id: str,
    *,
    max_prompt_tokens: int | None,
    cache_salt: str,
) -> ArmRequest:
    """Return a body as the message that an engine replica takes. Raises ApiError for plain text to an arm's prompt."""
    question: Question
    if isinstance(body, ChatRequest):
        texts = (t.content if isinstance(t.content, str) else "".join(p.text for p in t.content) for t in body.messages)
        roles: Iterator[Role] = ("system" if turn.role == "developer" else turn.role for turn in body.messages)
        question = tuple(map(Message, roles, texts))
        logprobs = body.top_logprobs if body.logprobs else None
    else:
        if arm.prompt is not None or arm.retriever is not None:
            raise bad_request("An arm has its own prompt: ask it at /v1/chat/completions.", param="model")
        question, logprobs = body.prompt, body.logprobs
    grammar = body.response_format.grammar() if body.response_format else None
    sampling = SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=tuple((int(key), value) for key, value in body.logit_bias.items()),
        min_new_tokens=body.min_tokens,
        logprobs=logprobs,
    )
    return ArmRequest(
        arm,
        question,
        request_id,
        sampling,
        max_new_tokens=body.max_tokens,
        n=body.n,
        stop_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        grammar=grammar or (GrammarText("regex", body.regex) if body.regex is not None else None),
        max_prompt_tokens=max_prompt_tokens,
        cache_salt=cache_salt,
    )


BodyT = TypeVar("BodyT", bound=BaseModel)


def parse(cls: type[BodyT], body: bytes) -> BodyT:
    """Return a request body as `cls`. Raises ApiError (400) that names the parameter."""
    try:
        tree = json.loads(body.decode("utf-8-sig"))
        if _ESCAPED_SURROGATE.search(body):
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("The body holds a lone surrogate, which is no Unicode text.", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise bad_request(f"The body must be a JSON object, not {type(tree).__name__}.", code="invalid_type")
    served: Json = {}
    for key, value in tree.items():
        if key not in NEUTRAL:
            if value is not None or key in ("model", "messages", "prompt", "adapter"):
                served[key] = value
        elif value is not None and (value != NEUTRAL[key] or isinstance(value, bool) != isinstance(NEUTRAL[key], bool)):
            raise bad_request(f"{key}={shorten(value)} is not supported here.", param=key, code="unsupported_parameter")
    try:
        return cls.model_validate(served)
    except pydantic.ValidationError as error:
        raise explain_body(error, cls) from None


# Answers: whole, as stream chunks, as a list of models. `openai.types` is the oracle of the tests, not a dependency:
# docs/log.md has the figures.

Kind = Literal["chat", "text"]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """The response to one request, whole or in chunks. `model`: as the caller wrote it."""

    kind: Kind
    request_id: str
    model: str
    base_digest: str
    created: int = field(default_factory=lambda: int(time.time()))

    def build_response(self, answers: Sequence[ArmAnswer]) -> Json:
        """The request's answers as one object."""
        choices: list[Json] = []
        for answer in answers:
            logprobs = None if answer.logprobs is None else self._logprobs(answer.logprobs)
            choice: Json = {"index": answer.index, "finish_reason": answer.finish_reason, "logprobs": logprobs}
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = answer.text
            choices.append(choice)
        return {
            "id": self.request_id,
            "object": "chat.completion" if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.base_digest[:12]}",
            "choices": choices,
            "usage": usage(answers),
            "graftwork": provenance(answers[0]),
        }

    def delta(self, text: str, *, index: int = 0, first: bool, logprobs: Sequence[TokenLogprob] | None = None) -> Json:
        """A chunk with the next piece of one answer's text. first: the chunk that opens the answer."""
        return self._chunk([self._choice(index, text, first=first, logprobs=logprobs)])

    def last(self, answer: ArmAnswer) -> Json:
        """The chunk that says why an answer ended and which version gave it."""
        choice = self._choice(answer.index, "", first=False, finish_reason=answer.finish_reason)
        return self._chunk([choice], graftwork=provenance(answer))

    def usage_chunk(self, answers: Sequence[ArmAnswer]) -> Json:
        """The chunk that `stream_options.include_usage` asks for: no choices, token counts."""
        return self._chunk([], usage=usage(answers))

    def _chunk(self, choices: list[Json], **more: Json) -> Json:
        return {
            "id": self.request_id,
            "object": "chat.completion.chunk" if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.base_digest[:12]}",
            "choices": choices,
            **more,
        }

    def _choice(
        self,
        index: int,
        text: str,
        *,
        first: bool,
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> Json:
        found = self._logprobs(logprobs) if logprobs else None
        choice: Json = {"index": index, "finish_reason": finish_reason, "logprobs": found}
        if self.kind == "text":
            choice["text"] = text
        elif first:
            choice["delta"] = {"role": "assistant", "content": text}
        else:
            choice["delta"] = {"content": text} if text else {}
        return choice

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return chat_logprobs(logprobs) if self.kind == "chat" else text_logprobs(logprobs)


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> Json:
    """Log probabilities as a chat completion has them."""

    def entry(one: Spelled) -> Json:
        return {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}

    content = [{**entry(one.token), "top_logprobs": [entry(other) for other in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: Sequence[TokenLogprob]) -> Json:
    """Log probabilities as the older text completion has them. The chosen token is always among the alternatives."""
    tops = [{other.text: other.logprob for other in (*one.top, one.token)} if one.top else None for one in logprobs]
    return {
        "tokens": [one.token.text for one in logprobs],
        "token_logprobs": [one.token.logprob for one in logprobs],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [one.offset for one in logprobs],
    }


def usage(answers: Sequence[ArmAnswer]) -> Json:
    """Token counts over the answers of one request; its prompt counts once, cached as the first answer found it."""
    prompt, completion = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(answer.cached_tokens for answer in answers)},
    }


def provenance(answer: ArmAnswer) -> Json:
    """Our extension field: which arm, version and base answered, from which passages, how soon."""
    return {
        "arm": answer.arm,
        "adapter": answer.adapter,
        "adapter_version": answer.adapter_version,
        "base_digest": answer.base_digest,
        "retrieved_ids": list(answer.retrieved_ids),
        "left_out_ids": list(answer.left_out_ids),
        "cited_ids": list(answer.cited_ids),
        "ttft_ms": round(answer.ttft_ms, 3),
        "latency_ms": round(answer.latency_ms, 3),
    }


def identity(arm: str, base_digest: str, version: str | None) -> dict[str, str]:
    """Response headers that say what answered, for callers that don't read the body. No version: the base alone."""
    found = {"x-graftwork-arm": arm, "x-graftwork-base-digest": base_digest}
    return found | ({"x-graftwork-adapter-version": version} if version is not None else {})


def sse(chunk: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def model_card(model: str, created: int, *, owned_by: str = "graftwork", **extra: str | None) -> Json:
    """One entry of GET /v1/models."""
    return {"id": model, "object": "model", "created": created, "owned_by": owned_by, "graftwork": extra}
