"""Requests and responses in the shape of the OpenAI API; what can't be honoured is refused by name, never ignored.

Shapes: https://platform.openai.com/docs/api-reference/chat. `temperature` defaults to 0 here, not 1: an arm's offline
score is measured greedily, and the live endpoint answers the same way unless the caller asks otherwise.
"""

import json
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from graftwork.chat import Message
from graftwork.serving.api_error import ApiError, bad_request
from graftwork.serving.arms import Sampling

NEUTRAL: dict[str, object] = {
    "n": 1, "best_of": 1, "logprobs": False, "top_logprobs": 0, "echo": False, "suffix": None, "logit_bias": {},
    "frequency_penalty": 0, "presence_penalty": 0, "response_format": {"type": "text"}, "modalities": ["text"],
    "tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "parallel_tool_calls": None,
    "audio": None, "prediction": None, "reasoning_effort": "none", "service_tier": "auto", "store": False,
    "verbosity": None, "web_search_options": None, "moderation": None,
}  # fmt: skip
"""Parameters of the OpenAI API that this endpoint does not serve, each with the value that changes nothing."""

NO_EFFECT = {"user", "safety_identifier", "metadata", "prompt_cache_key"}
"""Labels for the provider's books; no answer depends on them, so they are accepted."""


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

    @model_validator(mode="after")
    def _options_take_effect(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    def sampling(self) -> Sampling:
        """How the answer's tokens are chosen."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(self.limit(), self.temperature, self.top_p, self.top_k, self.seed, stop)

    def limit(self) -> int | None:
        """Longest answer that was asked for, in tokens."""
        return self.max_tokens


class ChatRequest(_Common):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The newer name of `max_tokens`."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit and differ here")
        return self

    def limit(self) -> int | None:
        """Longest answer that was asked for, in tokens."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Common):
    """Body of POST /v1/completions: the prompt is continued as it stands, without a chat template."""

    prompt: Annotated[str, Field(min_length=1)]


class RefreshRequest(BaseModel):
    """Body of POST /v1/adapters/refresh."""

    model_config = ConfigDict(strict=True, extra="forbid")
    adapter: Annotated[str, Field(min_length=1, max_length=256)]
    """`task@alias`: the alias is read again, and new requests get the version it points at."""


BodyT = TypeVar("BodyT", bound=BaseModel)


def parse(cls: type[BodyT], body: bytes) -> BodyT:
    """A request body as `cls`. Raises ApiError (400) that names the parameter."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise bad_request(f"The body must be a JSON object, not {type(tree).__name__}.", code="invalid_type")
    if not _is_utf8(tree):
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
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained")))
    param = where.removesuffix(".str") or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"Unknown parameter: {where!r}.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {where!r}.", param=param, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(first["input"], BaseModel | dict) else f" (found {_short(first['input'])})"
    return bad_request(f"{param or cls.__name__}: {message}{found}", param=param, code="invalid_value")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
