"""Requests in the shape of the OpenAI API; what can't be honoured is refused by name, never ignored.

Shapes: https://platform.openai.com/docs/api-reference/chat. `temperature` defaults to 0 here, not 1: an arm's offline
score is measured greedily, and the live endpoint answers the same way unless the caller asks otherwise.
"""

import base64
import difflib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import ErrorDetails

from graftwork.prompts.render import Message
from graftwork.retrieval.embedder import Embedded
from graftwork.serving.api.errors import ApiError, bad_request
from graftwork.serving.api.openai_responses import Json
from graftwork.serving.engine.grammar import GrammarText
from graftwork.serving.engine.request import MAX_TOP_LOGPROBS, MIN_REPETITION_PENALTY, SamplingParams
from graftwork.serving.messages import ArmRequest, Question
from graftwork.serving.spec import ArmSpec

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

NO_EFFECT = {"user", "safety_identifier", "metadata", "prompt_cache_key"}
"""Labels for the provider's books; no answer depends on them, so they are accepted."""

NAMED_HERE = {
    "guided_json": "response_format",
    "guided_regex": "regex",
    "structured_outputs": "response_format or regex",
    "json_schema": "response_format",
    "typical_p": "min_p",
    "min_new_tokens": "min_tokens",
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
}
"""What other servers call a parameter, and its one name here."""

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

    def message(self) -> Message:
        """As the prompt builder takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

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
    """What the answer must look like: any text, any JSON object, or JSON of a schema."""

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
    """What both kinds of completion take."""

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
                raise ValueError(f"its keys are token ids, found {_short(key)}")
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

    def request(
        self, arm: ArmSpec, question: Question, request_id: str, *, max_prompt_tokens: int | None, cache_salt: str
    ) -> ArmRequest:
        """Return the body as the message that an engine replica takes."""
        shaped = self.response_format.grammar() if self.response_format else None
        sampling = SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple((int(key), value) for key, value in self.logit_bias.items()),
            min_new_tokens=self.min_tokens,
            logprobs=self.top_logprob_count(),
        )
        return ArmRequest(
            arm,
            question,
            request_id,
            sampling,
            max_new_tokens=self.max_tokens,
            n=self.n,
            stop_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            grammar=shaped or (GrammarText("regex", self.regex) if self.regex is not None else None),
            max_prompt_tokens=max_prompt_tokens,
            cache_salt=cache_salt,
        )

    def top_logprob_count(self) -> int | None:
        """Return how many alternatives are reported with the chosen token; None reports no log probability."""
        return None


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

    def top_logprob_count(self) -> int | None:
        """Return `top_logprobs`, where `logprobs` asks for any."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Common):
    """Body of POST /v1/completions: the prompt is continued as it stands, without a chat template."""

    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = COMPLETION_TOKENS
    prompt: Annotated[str, Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def top_logprob_count(self) -> int | None:
        """`logprobs` itself: this older API counts the alternatives there."""
        return self.logprobs


BodyT = TypeVar("BodyT", bound=BaseModel)


def parse(cls: type[BodyT], body: bytes) -> BodyT:
    """A request body as `cls`. Raises ApiError (400) that names the parameter."""
    try:
        tree = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise bad_request(f"The body must be a JSON object, not {type(tree).__name__}.", code="invalid_type")
    if _ESCAPED_SURROGATE.search(body) and not _is_utf8(tree):
        raise bad_request("The body holds a lone surrogate, which is no Unicode text.", code="invalid_json")
    try:
        return cls.model_validate(_without_neutral(tree))
    except pydantic.ValidationError as error:
        raise _explain(error, cls) from None


def _is_utf8(tree: dict[str, Any]) -> bool:
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_neutral(tree: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in NEUTRAL:
            if value is not None or key in ("model", "messages", "prompt", "adapter"):
                kept[key] = value
        elif value is not None and (value != NEUTRAL[key] or isinstance(value, bool) != isinstance(NEUTRAL[key], bool)):
            raise bad_request(f"{key}={_short(value)} is not supported here.", param=key, code="unsupported_parameter")
    return kept


def _explain(error: pydantic.ValidationError, cls: type[BaseModel]) -> ApiError:
    first = _meant(error.errors())
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained")))
    param = where.removesuffix(".str") or None
    if first["type"] == "literal_error" and where.endswith(".type") and where.startswith("messages."):
        return bad_request(
            f"{where}: only text is served, no images, sound or files.", param=param, code="invalid_value"
        )
    if first["type"] == "extra_forbidden":
        here = f" Here it is called {NAMED_HERE[where]}." if where in NAMED_HERE else _nearest(where, cls)
        return bad_request(f"Unknown parameter: {where!r}.{here}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {where!r}.", param=param, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "it must be")
    if first["type"] == "too_short":
        message = f"it needs at least {first['ctx']['min_length']} of them"
    found = "" if isinstance(first["input"], BaseModel | dict) else f" (found {_short(first['input'])})"
    if param is None:  # a rule over several parameters begins with the name of one
        name = message.split(" ", 1)[0]
        return bad_request(f"{message}.", param=name if name in cls.model_fields else None, code="invalid_value")
    return bad_request(f"{param}: {message}{found}", param=param, code="invalid_value")


def _meant(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first error; of a parameter that takes text or a list, what is wrong with the list that was found there."""
    first = errors[0]
    as_text = first["loc"][-1:] == ("str",) and isinstance(first["input"], list)
    return errors[1] if as_text and len(errors) > 1 else first


def _nearest(name: str, cls: type[BaseModel]) -> str:
    near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.7)
    return f" Did you mean {near[0]!r}?" if near else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
