"""The HTTP surface: the OpenAI API over the arms, in one FastAPI app behind Ray Serve.

Every response that is no answer has OpenAI's error body, whatever went wrong. Nothing here touches engine or store.
"""

import asyncio
import hashlib
import hmac
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

import graftwork
from graftwork.artifact import AdapterManifest
from graftwork.serving.api_error import ApiError, bad_request, unknown_model
from graftwork.serving.arms import ArmAnswer, Dump, Question
from graftwork.serving.backend import Backend, ServeBackend
from graftwork.serving.catalog import Catalog
from graftwork.serving.live import snapshot, total
from graftwork.serving.live_page import page
from graftwork.serving.logprobs import TokenLogprob
from graftwork.serving.metrics_families import CONTENT_TYPE, render
from graftwork.serving.metrics_http import CountedHttp, http_families
from graftwork.serving.openai_embeddings import EmbeddingRequest, embedding_response
from graftwork.serving.openai_responses import DONE, Envelope, Json, Kind, sse
from graftwork.serving.openai_types import ChatRequest, CompletionRequest, RefreshRequest, parse
from graftwork.serving.openapi import ERRORS, body_of, describe
from graftwork.serving.spec import ArmSpec, ServeSpec

MAX_BODY_BYTES = 4 * 2**20
"""A larger body is refused before it is read whole: a prompt of 128k tokens takes about 0.6 MB."""
READY_TIMEOUT_S = 5.0


class Ingress:
    """The Serve deployment that runs the app. It holds no state, so any number of replicas will do."""

    def __init__(
        self, spec: Dump, replica: DeploymentHandle, token_sha256: str | None, embedder: DeploymentHandle | None
    ) -> None:
        self._spec, self._token_sha256 = ServeSpec.model_validate(spec), token_sha256
        self._backend = ServeBackend(replica, self._spec.request_timeout_s, embedder)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve calls this once, in the replica's process."""
        return make_app(self._spec, self._backend, self._token_sha256)


def make_app(spec: ServeSpec, backend: Backend, token_sha256: str | None) -> FastAPI:
    """The app. `token_sha256`: hex digest of the bearer token that /v1 wants; None leaves it open (loopback only)."""
    handlers: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
        ApiError: _on_api_error,
        HTTPException: _on_http_error,
        Exception: _on_bug,
    }
    app = FastAPI(
        title="graftwork", version=graftwork.__version__, docs_url=None, redoc_url=None, exception_handlers=handlers
    )
    surface = Surface(Catalog(spec), backend)
    app.add_middleware(CountedHttp, counts=surface.responses)
    guarded = [Depends(_token_check(token_sha256))] if token_sha256 else []
    for path, post, body in (
        ("/v1/chat/completions", surface.chat, ChatRequest),
        ("/v1/completions", surface.completions, CompletionRequest),
        ("/v1/embeddings", surface.embeddings, EmbeddingRequest),
        ("/v1/adapters/refresh", surface.refresh, RefreshRequest),
    ):
        app.add_api_route(path, post, methods=["POST"], dependencies=guarded, response_model=None, responses=ERRORS,
                          openapi_extra=body_of(body))  # fmt: skip
    for path, get in (
        ("/v1/models", surface.models),
        ("/v1/models/{model:path}", surface.model),
        ("/v1/adapters", surface.adapters),
        ("/v1/stats", surface.stats),
        ("/v1/live", surface.live),
        ("/metrics", surface.metrics),
    ):
        app.add_api_route(path, get, methods=["GET"], dependencies=guarded, response_model=None, responses=ERRORS)
    for path, probe in (("/", surface.page), ("/health", surface.health), ("/ready", surface.ready)):
        app.add_api_route(path, probe, methods=["GET"], response_model=None, responses=ERRORS)
    describe(app, [ChatRequest, CompletionRequest, EmbeddingRequest, RefreshRequest])
    return app


class Surface:
    """One method a route."""

    def __init__(self, catalog: Catalog, backend: Backend) -> None:
        self._catalog, self._backend = catalog, backend
        self.responses: Counter[tuple[str, str, str]] = Counter()
        """HTTP responses by route, method and status."""

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = parse(ChatRequest, await _body(request))
        messages = [{"role": turn.role, "content": turn.content} for turn in (m.message() for m in body.messages)]
        return await self._complete("chat", body, self._catalog.arm(body.model), messages)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: the text is continued as it stands."""
        body = parse(CompletionRequest, await _body(request))
        arm = self._catalog.arm(body.model)
        if arm.prompt is not None or arm.retriever is not None:
            raise bad_request("An arm has its own prompt: ask it at /v1/chat/completions.", param="model")
        return await self._complete("text", body, arm, body.prompt)

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: vectors of the endpoint's embedder."""
        body = parse(EmbeddingRequest, await _body(request))
        self._catalog.require_embedder(body.model)
        return JSONResponse(embedding_response(body, await self._backend.embed(body.texts())))

    async def refresh(self, request: Request) -> Response:
        """POST /v1/adapters/refresh: every replica reads the alias again; returns once all new requests follow it."""
        body = parse(RefreshRequest, await _body(request))
        done = await self._backend.each("refresh", self._catalog.ref(body.adapter))
        return JSONResponse({"object": "list", "data": done})

    async def adapters(self) -> Response:
        """GET /v1/adapters: the versions in each engine replica, with their state."""
        found = await self._backend.each("adapters")
        return JSONResponse({"object": "list", "data": [adapter for adapters in found for adapter in adapters]})

    async def stats(self) -> Response:
        """GET /v1/stats: the counters of each engine replica, and of all together."""
        replicas = await self._backend.each("stats")
        return JSONResponse({"replicas": replicas, "engine": total([replica["engine"] for replica in replicas])})

    async def live(self) -> Response:
        """GET /v1/live: what the page shows: replicas, adapters, traffic."""
        return JSONResponse(snapshot(await self._backend.each("live"), time.monotonic()))

    async def metrics(self) -> Response:
        """GET /metrics: Prometheus text. Replicas that can't answer are missing from it, the ingress never is."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                replicas = dict(await self._backend.each("metrics"))
        except (ApiError, TimeoutError):
            replicas = {}
        return Response(render(replicas, http_families(self.responses)), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        """GET /v1/models: base, arms, and every adapter of the store, loaded or not."""
        return JSONResponse({"object": "list", "data": await self._cards()})

    async def model(self, model: str) -> Response:
        """GET /v1/models/{model}."""
        for card in await self._cards():
            if card["id"] == model:
                return JSONResponse(card)
        raise unknown_model(model, "GET /v1/models lists them all.")

    async def page(self) -> Response:
        """GET /: the live page. It needs no token, for it holds nothing: it asks for one and calls /v1 with it."""
        return page()

    async def health(self) -> Response:
        """GET /health: the endpoint's process lives. Needs no token and tells nothing else."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """GET /ready: 200 while an engine replica is warm and decodes, else 503. A draining one no longer counts."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                replicas = await self._backend.each("ready")
        except (ApiError, TimeoutError):
            replicas = []
        if not any(replicas):
            raise ApiError(503, "No engine is running.", code="engine_unavailable")
        return JSONResponse({"status": "ready", "replicas": sum(replicas)})

    async def _complete(
        self, kind: Kind, body: ChatRequest | CompletionRequest, arm: ArmSpec, asked: Question
    ) -> Response:
        request_id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        call = arm.model_dump(mode="json"), asked, request_id, body.sampling().dump()
        headers = {"x-request-id": request_id}
        if not body.stream:
            answers = [ArmAnswer.load(answer) for answer in await self._backend.choices(*call)]
            envelope = Envelope.open(kind, request_id, body.model, answers[0].base_digest)
            return JSONResponse(envelope.whole(answers), headers=headers)
        chunks = self._backend.stream(*call)
        admitted = await anext(aiter(chunks))  # raises what refuses the request, while the status can still be set
        envelope = Envelope.open(kind, request_id, body.model, admitted["base_digest"])
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(envelope, chunks, choices=body.n, with_usage=with_usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"}
        )

    async def _cards(self) -> list[Json]:
        found = await self._backend.call("models")
        adapters = [(AdapterManifest.model_validate(a["manifest"]), a["aliases"]) for a in found["adapters"]]
        return self._catalog.cards(adapters, found["ready_at"])


async def _events(
    envelope: Envelope, chunks: AsyncGenerator[Dump], *, choices: int, with_usage: bool
) -> AsyncIterator[bytes]:
    answers: list[ArmAnswer] = []
    async with aclosing(chunks):
        try:
            for index in range(choices):
                yield sse(envelope.delta("", index=index, first=True))
            async for chunk in chunks:
                if "answer" in chunk:
                    answers.append(ArmAnswer.load(chunk["answer"]))
                    yield sse(envelope.last(answers[-1]))
                else:
                    told = [TokenLogprob.load(one) for one in chunk["logprobs"]]
                    yield sse(envelope.delta(chunk["text"], index=chunk["index"], first=False, logprobs=told))
            if with_usage:
                yield sse(envelope.usage_chunk(answers))
            yield DONE
        except ApiError as error:  # too late for a status: the stream ends with the error, without [DONE]
            yield sse(error.body())


async def _body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "0")
    parts, size = [], int(declared) if declared.isdecimal() else 0
    if size <= MAX_BODY_BYTES:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                break
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="request_too_large")
    return b"".join(parts)


def _token_check(token_sha256: str) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).hexdigest()
        if not (hmac.compare_digest(digest, token_sha256) and scheme.lower() == "bearer"):
            raise ApiError(401, "Missing or wrong API key: send 'Authorization: Bearer KEY'.", code="invalid_api_key")

    return check


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body(), error.status, headers=headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(
        ApiError(error.status_code, asked, code="unknown_url").body(), error.status_code, headers=error.headers
    )


async def _on_bug(_request: Request, _error: Exception) -> Response:
    message = "The endpoint failed on this request; its log says why."
    return JSONResponse(ApiError(500, message, code="internal_error").body(), 500)
