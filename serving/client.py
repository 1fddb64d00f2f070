"""Client of a running endpoint, for the command line and for load tests: httpx, typed, errors as ApiError."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from graftwork.errors import ClusterError
from graftwork.prompts.render import Message
from graftwork.serving.api.errors import ApiError
from graftwork.serving.api.openai_protocol import Json

CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One question to one model."""

    model: str
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def body(self, *, stream: bool) -> Json:
        """JSON of the request."""
        body: Json = {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stop": list(self.stop) or None,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return {key: value for key, value in body.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ClientReply:
    """A whole answer and where it came from. `adapter_version` None: the base answered."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    arm: str
    adapter_version: str | None
    base_digest: str
    retrieved_ids: tuple[str, ...]
    ttft_ms: float
    latency_ms: float
    left_out_ids: tuple[str, ...] = ()
    """Passages that were found and did not fit `retriever.context_tokens`."""
    cited_ids: tuple[str, ...] = ()
    """Passages that the text cites, where the arm's prompt numbers them."""


class Client:
    """Synchronous calls. `token`: the endpoint's API token. Raises ApiError, or ClusterError where nothing answers."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 600.0) -> None:
        self._url = url
        self._http = httpx.Client(**_settings(url, token, timeout_s))

    def chat(self, call: ChatCall) -> ClientReply:
        """The whole answer."""
        return _complete_reply(self._json("POST", "/v1/chat/completions", call.body(stream=False)))

    def stream(self, call: ChatCall) -> Iterator[str | ClientReply]:
        """Pieces of text as they come; the last item is the whole `ClientReply`."""
        with (
            _connection_errors(self._url),
            self._http.stream("POST", "/v1/chat/completions", json=call.body(stream=True)) as response,
        ):
            if response.is_error:
                response.read()
                raise _error(response)
            growing = _GrowingReply()
            for line in response.iter_lines():
                if piece := growing.push(line):
                    yield piece
        yield growing.reply()

    def models(self) -> list[Json]:
        """Models of GET /v1/models."""
        return self._list("GET", "/v1/models")

    def adapters(self) -> list[Json]:
        """Adapter versions in the engine, with state and running requests."""
        return self._list("GET", "/v1/adapters")

    def stats(self) -> Json:
        """`replicas`: each engine replica with its counters; `engine`: their sum."""
        return self._json("GET", "/v1/stats")

    def metrics(self) -> str:
        """GET /metrics: Prometheus text."""
        return self._send("GET", "/metrics").text

    def refresh(self, ref: str) -> str:
        """Have every replica read `task@alias` again; returns the version that new requests get from now on."""
        version: str = self.admin("refresh", adapter=ref)[0]["new"]
        return version

    def admin(self, verb: str, **body: str | None) -> list[Json]:
        """An admin verb: register (uri, alias), promote (adapter, version), else (adapter). Needs the admin's token."""
        given = {key: value for key, value in body.items() if value is not None}
        return self._list("POST", f"/v1/admin/adapters/{verb}", given)

    def registered(self) -> list[Json]:
        """Every version of the store for this base, with its tier, state and bytes. Needs the admin's token."""
        return self._list("GET", "/v1/admin/adapters")

    def experiments(self) -> list[Json]:
        """Every experiment with what it is doing now. Needs the admin's token."""
        return self._list("GET", "/v1/admin/experiments")

    def experiment(self, verb: str, **body: Any) -> Json:
        """start (spec), ramp (name, weights), stop, kill, resume (name); returns what it is doing then."""
        return self._list("POST", f"/v1/admin/experiments/{verb}", body)[0]

    def ready(self) -> bool:
        """Return True while the endpoint answers and an engine decodes."""
        try:
            return bool(self._json("GET", "/ready")["status"] == "ready")
        except (ApiError, ClusterError):
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _list(self, method: str, path: str, body: Json | None = None) -> list[Json]:
        data: list[Json] = self._json(method, path, body)["data"]
        return data

    def _json(self, method: str, path: str, body: Json | None = None) -> Json:
        tree: Json = self._send(method, path, body).json()
        return tree

    def _send(self, method: str, path: str, body: Json | None = None) -> httpx.Response:
        with _connection_errors(self._url):
            response = self._http.request(method, path, json=body)
        if response.is_error:
            raise _error(response)
        return response


class AsyncClient:
    """`Client.chat` for many questions at once. Use as `async with`."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 600.0) -> None:
        self._url, self._http = url, httpx.AsyncClient(**_settings(url, token, timeout_s))

    async def chat(self, call: ChatCall, *, stream: bool = False) -> ClientReply:
        """The whole answer, by one response or read off a stream."""
        if not stream:
            return _complete_reply(await self._post("/v1/chat/completions", call.body(stream=False)))
        growing = _GrowingReply()
        body = call.body(stream=True)
        with _connection_errors(self._url):
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise _error(response)
                async for line in response.aiter_lines():
                    growing.push(line)
        return growing.reply()

    async def refresh(self, ref: str) -> str:
        """As `Client.refresh`."""
        version: str = (await self._post("/v1/admin/adapters/refresh", {"adapter": ref}))["data"][0]["new"]
        return version

    async def _post(self, path: str, body: Json) -> Json:
        with _connection_errors(self._url):
            response = await self._http.post(path, json=body)
        if response.is_error:
            raise _error(response)
        tree: Json = response.json()
        return tree

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()


class _GrowingReply:
    """Puts a stream's events together."""

    def __init__(self) -> None:
        self._text, self._finish_reason, self._tree, self._done = "", "", Json(), False

    def push(self, line: str) -> str:
        """The text of one line of the stream. Raises ApiError where the stream carries an error."""
        if not line.startswith("data: "):
            return ""
        if line == "data: [DONE]":
            self._done = True
            return ""
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise _api_error(500, event["error"])
        self._tree |= {key: event[key] for key in ("graftwork", "usage") if key in event}
        piece = ""
        for choice in event["choices"]:
            piece += choice["delta"].get("content") or ""
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        self._text += piece
        return piece

    def reply(self) -> ClientReply:
        """The whole. Raises ApiError where the stream broke off."""
        if not self._done:
            raise ApiError(502, "The stream broke off before its end.", code="stream_broken")
        return _reply(self._text, self._finish_reason, self._tree)


def _complete_reply(tree: Json) -> ClientReply:
    (choice,) = tree["choices"]
    return _reply(choice["message"]["content"], choice["finish_reason"], tree)


def _reply(text: str, finish_reason: str, tree: Json) -> ClientReply:
    came, usage = tree["graftwork"], tree["usage"]
    return ClientReply(
        text,
        finish_reason,
        usage["prompt_tokens"],
        usage["completion_tokens"],
        came["arm"],
        came["adapter_version"],
        came["base_digest"],
        tuple(came["retrieved_ids"]),
        came["ttft_ms"],
        came["latency_ms"],
        tuple(came["left_out_ids"]),
        tuple(came["cited_ids"]),
    )


def _settings(url: str, token: str | None, timeout_s: float) -> Json:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
    # Straight to the endpoint: a proxy of the environment must not see its traffic or its token.
    return {"base_url": url, "headers": headers, "timeout": timeout, "limits": limits, "trust_env": False}


@contextlib.contextmanager
def _connection_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as error:
        raise ClusterError(
            f"endpoint {url}", f"nothing answers there ({error})", "", "start it with `graftwork serve FILE`"
        ) from error
    except httpx.TransportError as error:
        raise ApiError(
            502, f"The connection to {url} broke: {type(error).__name__} {error}", code="connection"
        ) from error


def _error(response: httpx.Response) -> ApiError:
    try:
        found = response.json()["error"]
    except (ValueError, KeyError, TypeError):  # not from our app: a proxy in between
        found = {"message": response.text[:500]}
    return _api_error(response.status_code, found)


def _api_error(status: int, found: Json) -> ApiError:
    return ApiError(status, str(found.get("message")), code=found.get("code"), param=found.get("param"))
