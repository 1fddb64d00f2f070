"""Errors in the shape of the OpenAI API: a status, a message, a type, the parameter and a code."""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
from typing import Any

import pydantic
from pydantic import BaseModel

from graftwork.artifacts.registry import UnknownAdapter
from graftwork.errors import ArtifactError, DataError, GraftworkError, StorageError
from graftwork.serving.engine.grammar import GrammarError
from graftwork.serving.engine.request import SamplingError

log = logging.getLogger("ray.serve")


class ApiError(GraftworkError):
    """An error that a caller of the endpoint (HTTP or handle) gets. Ray carries it between processes whole."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, Any]:
        return _rebuild, (self.status, self.message, self.code, self.param, self.retry_after_s)

    def text(self) -> str:
        """The message with its status and code, for logs and tables."""
        return f"{self.subject} (HTTP {self.status}, {self.code})" if hasattr(self, "status") else self.subject

    @property
    def kind(self) -> str:
        """OpenAI's error `type`: whose fault it is."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        found = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.status in (408, 413):  # the rest of the body is not waited for
            found["connection"] = "close"
        return found | ({"retry-after": str(self.retry_after_s)} if self.retry_after_s is not None else {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body that OpenAI clients map to their exception types."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _rebuild(status: int, message: str, code: str | None, param: str | None, retry_after_s: int | None) -> ApiError:
    return ApiError(status, message, code=code, param=param, retry_after_s=retry_after_s)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can't be served as it is."""
    return ApiError(400, message, code=code, param=param)


def unknown_model(model: str, known: str) -> ApiError:
    """404: no such model. Never answered by the base instead."""
    return ApiError(404, f"The model {model!r} does not exist. {known}", code="model_not_found", param="model")


def engine_lost(detail: str) -> ApiError:
    """503: the engine's process ended while it worked on the request; a new one is being started."""
    return ApiError(
        503, f"The engine was lost while it worked on this request ({detail}). Try again.", code="engine_lost"
    )


class PromptTooLong(DataError):
    """The prompt leaves no room for an answer in the longest sequence. Nothing is ever cut."""


class AnswerTooLong(PromptTooLong):
    """The prompt fits, but not together with the longest answer that was asked for."""


@contextlib.contextmanager
def as_api_errors() -> Iterator[None]:
    """Turn errors of the block into ApiErrors, see `to_api_error`."""
    try:
        yield
    except ApiError:
        raise
    except GraftworkError as error:
        raise to_api_error(error) from error


_API_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_ids": "stop_token_ids"}
"""The engine's names of parameters as the API has them, where they differ."""


def to_api_error(error: GraftworkError) -> ApiError:
    """Return what the caller gets for an error: 4xx for the request's fault, 5xx for ours, which is logged."""
    first = f"{error.subject}: {error.problem}" if error.problem else error.subject
    hint = error.hint[:1].upper() + error.hint[1:]
    message = ". ".join(part.rstrip(".") for part in (first, error.rule, hint) if part) + "."
    if isinstance(error, PromptTooLong):
        param = "max_tokens" if isinstance(error, AnswerTooLong) else "messages"
        return bad_request(message, param=param, code="context_length_exceeded")
    if isinstance(error, UnknownAdapter):  # its own text names the store's place and tasks: not for callers
        return unknown_model(error.subject.removeprefix("adapter "), "GET /v1/models lists them all.")
    if isinstance(error, ArtifactError):  # version and file are enough; the folders above are the endpoint's own
        message = re.sub(r"^(?:[a-z0-9]+:/)?/\S*/(?=[^/\s]+/[^/\s]+)", "", message)
        return bad_request(message, param="model", code="adapter_not_servable")
    if isinstance(error, SamplingError):
        name = re.split("[=:]", error.subject)[0]
        return bad_request(message, param=_API_NAMES.get(name, name), code="invalid_value")
    if isinstance(error, GrammarError):
        param = "regex" if error.subject == "regex" else "response_format"
        return bad_request(message, param=param, code="invalid_grammar")
    if isinstance(error, DataError):
        return bad_request(message, param="messages", code="invalid_value")
    log.error("%s", error)
    if isinstance(error, StorageError):
        return ApiError(503, "The adapter store can't be read now. Try again.", code="storage_unavailable")
    return ApiError(500, "The endpoint failed on this request; its log says why.", code="internal_error")


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
"""Names of parameters on other servers, and the one name here."""


def explain_body(error: pydantic.ValidationError, cls: type[BaseModel]) -> ApiError:
    """Return a 400 that names the parameter of a request body that pydantic refused."""
    first, *others = error.errors()
    if first["loc"][-1:] == ("str",) and isinstance(first["input"], list) and others:
        first = others[0]  # of a parameter that takes text or a list, the error of the list that was found there
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained")))
    param = where.removesuffix(".str") or None
    if first["type"] == "literal_error" and where.endswith(".type") and where.startswith("messages."):
        return bad_request(
            f"{where}: only text is served, no images, sound or files.", param=param, code="invalid_value"
        )
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, cls.model_fields, n=1, cutoff=0.7)
        here = f" Did you mean {near[0]!r}?" if near else ""
        if where in NAMED_HERE:
            here = f" Here it is called {NAMED_HERE[where]}."
        return bad_request(f"Unknown parameter: {where!r}.{here}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {where!r}.", param=param, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "it must be")
    if first["type"] == "too_short":
        message = f"it needs at least {first['ctx']['min_length']} of them"
    found = "" if isinstance(first["input"], BaseModel | dict) else f" (found {shorten(first['input'])})"
    if param is None:  # a rule over several parameters begins with the name of one
        name = message.split(" ", 1)[0]
        return bad_request(f"{message}.", param=name if name in cls.model_fields else None, code="invalid_value")
    return bad_request(f"{param}: {message}{found}", param=param, code="invalid_value")


def shorten(value: object) -> str:
    """Return the value's repr, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
