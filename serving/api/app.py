"""HTTP app of an endpoint: the OpenAI API over the arms, in one FastAPI app behind Ray Serve.

Every response that is no answer has OpenAI's error body. The app does not touch the engine; the store only through
`Experiments`, off the response path.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from operator import attrgetter
from typing import Any

from fastapi import Depends, FastAPI, Request, params
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import graftwork
from graftwork.serving.ab_test.live_experiment import LiveRequest
from graftwork.serving.ab_test.routes import EXPERIMENTS, ExperimentRoutes
from graftwork.serving.ab_test.service import PREFIX as EXPERIMENT
from graftwork.serving.ab_test.service import SESSION_HEADER, experiment_families
from graftwork.serving.api import status
from graftwork.serving.api.admin import ADMIN, ADMIN_CONFIG, ADMIN_PREFIX, Admin, Handler, Route
from graftwork.serving.api.auth import HostAndOrigin, Keys, admin_check, read_body, user_check
from graftwork.serving.api.errors import ApiError, as_api_errors, bad_request
from graftwork.serving.api.openai_protocol import (
    DONE,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Envelope,
    Json,
    Kind,
    arm_request,
    embedding_response,
    identity,
    model_card,
    parse,
    sse,
)
from graftwork.serving.api.rate_limits import ANYBODY, RequestSize, caller
from graftwork.serving.arms import require_bytes, size_of
from graftwork.serving.live_config import LiveConfig
from graftwork.serving.messages import AnswerDelta, ArmAnswer, StreamChunk, StreamStart
from graftwork.serving.metrics import CountedHttp
from graftwork.serving.metrics_export import CONTENT_TYPE, ReplicaSnapshot, http_families, render
from graftwork.serving.models import ModelList
from graftwork.serving.router import EngineBackend, ServeBackend
from graftwork.serving.spec import ArmSpec, ServeSpec

READY_TIMEOUT_S = 5.0
LARGE_PROMPT_BYTES = 65_536
"""Of a longer prompt the ingress looks whether it can fit, before a replica gets it."""


class Ingress:
    """The Serve deployment that runs the app, in one process: the callers' rates are counted there."""

    def __init__(self, spec: Json, replica: DeploymentHandle, keys: Keys, embedder: DeploymentHandle | None) -> None:
        self._keys, endpoint = keys, ServeSpec.model_validate(spec)
        self._backend = ServeBackend(replica, endpoint.request_timeout_s, embedder)
        self._live, self._opened = LiveConfig(endpoint, self._backend), False

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve calls this once, in the replica's process."""
        return make_app(self._live, self._backend, self._keys)

    async def reconfigure(self, user_config: Json) -> None:
        """Ray Serve calls this before the first request, and at each change of the Serve config."""
        if self._opened:
            self._live.update(user_config)
            return
        await self._live.open(user_config)
        self._opened = True


def make_app(live: LiveConfig, backend: EngineBackend, keys: Keys) -> FastAPI:
    """The app. `keys`: digests of the bearer tokens that /v1 wants; without any it is open (loopback only)."""
    routes = Routes(live, backend)
    app = FastAPI(
        title="graftwork",
        version=graftwork.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_bug},
        lifespan=_lifespan(live),
    )
    if origins := live.spec.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(HostAndOrigin, spec=live.spec)
    app.add_middleware(CountedHttp, counts=routes.responses)
    guarded, owned = [Depends(user_check(keys, live.limits))], [Depends(admin_check(keys, live.limits))]
    _add_routes(app, routes, Admin(live, backend), ExperimentRoutes(live.experiments), guarded, owned)
    return app


def _add_routes(
    app: FastAPI,
    routes: "Routes",
    admin: Admin,
    experiments: ExperimentRoutes,
    guarded: list[params.Depends],
    owned: list[params.Depends],
) -> None:
    """Add every route: those of users behind `guarded`, those of the owner behind `owned`, probes and page open."""
    posts: list[Route] = [
        ("/v1/chat/completions", routes.chat, ChatRequest),
        ("/v1/completions", routes.completions, CompletionRequest),
        ("/v1/embeddings", routes.embeddings, EmbeddingRequest),
        *admin.routes(),
        *experiments.routes(),
    ]
    gets: list[tuple[str, Callable[..., Coroutine[Any, Any, Response]], list[params.Depends]]] = [
        *((ADMIN_PREFIX, admin.listing, owned), (ADMIN_CONFIG, admin.config, owned)),
        *((EXPERIMENTS, experiments.listing, owned), ("/v1/models", routes.models, guarded)),
        *(("/v1/models/{model:path}", routes.model, guarded), ("/v1/adapters", routes.adapters, guarded)),
        *(("/v1/stats", routes.stats, guarded), ("/v1/live", routes.live, guarded)),
        *(("/metrics", routes.metrics, guarded), ("/", routes.page, [])),
        *(("/health", routes.health, []), ("/ready", routes.ready, [])),
    ]
    for path, post, body in posts:
        changes = path.startswith(ADMIN)
        app.add_api_route(
            path,
            routes.changing(post) if changes else post,
            methods=["POST"],
            dependencies=owned if changes else guarded,
            response_model=None,
            responses=ERRORS,
            openapi_extra=body_of(body),
        )
    for path, get, guard in gets:
        app.add_api_route(path, get, methods=["GET"], dependencies=guard, response_model=None, responses=ERRORS)
    app.add_api_route("/openapi.json", _description, methods=["GET"], dependencies=guarded, include_in_schema=False)
    describe(app, list(dict.fromkeys(body for _, _, body in posts)))


async def _description(request: Request) -> Response:
    """GET /openapi.json: behind the token, for it names the admin routes."""
    return JSONResponse(request.app.openapi())


def _lifespan(live: LiveConfig) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return the app's lifespan: experiments that run go on, and their rows are written before the end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        with suppress(ApiError):  # the store is out of reach: others are served
            await live.experiments.open()
        live.start()
        yield
        await live.experiments.close()

    return lifespan


class Routes:
    """One method a route."""

    def __init__(self, live: LiveConfig, backend: EngineBackend) -> None:
        self._backend, self._live = backend, live
        self._catalog, self._limits, self._experiments = live.catalog, live.limits, live.experiments
        self._longest_token_bytes: int | None = None
        self._models = ModelList(live.catalog, backend)
        self.responses: Counter[tuple[str, str, str]] = Counter()
        """HTTP responses by route, method and status."""

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body, request_id = parse(ChatRequest, await read_body(request)), f"chatcmpl-{uuid.uuid4().hex}"
        if not body.model.startswith(EXPERIMENT):
            return await self._complete("chat", body, request_id)
        session = request.headers.get(SESSION_HEADER)
        live = await self._experiments.request(body.model, body.user, session, request_id)
        return await self._complete("chat", body, request_id, live)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: the text is continued as it stands."""
        body = parse(CompletionRequest, await read_body(request))
        return await self._complete("text", body, f"cmpl-{uuid.uuid4().hex}")

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: vectors of the endpoint's embedder."""
        body = parse(EmbeddingRequest, await read_body(request))
        self._catalog.require_embedder(body.model)
        reserved = self._limits.reserve(caller.get(), sum(len(text.encode()) + 2 for text in body.texts()))
        try:
            embedded = await self._backend.embed(body.texts())
        except ApiError:
            reserved.resize(0)
            raise
        reserved.resize(sum(embedded.tokens))
        return JSONResponse(embedding_response(body, embedded))

    async def adapters(self) -> Response:
        """GET /v1/adapters: the versions in each engine replica, with their state."""
        found = await self._backend.each("adapters")
        return JSONResponse({"object": "list", "data": [adapter for adapters in found for adapter in adapters]})

    async def stats(self) -> Response:
        """GET /v1/stats: the counters of each engine replica, and of all together."""
        return JSONResponse(status.stats(await self._backend.each("snapshot")))

    async def live(self) -> Response:
        """GET /v1/live: what the page shows: replicas, adapters, traffic."""
        return JSONResponse(status.live(await self._backend.each("snapshot"), time.monotonic()))

    async def metrics(self) -> Response:
        """GET /metrics: Prometheus text. Replicas that can't answer are missing from it, the ingress never is."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                replicas: list[ReplicaSnapshot] = await self._backend.each("snapshot")
        except (ApiError, TimeoutError):
            replicas = []
        own = [*http_families(self.responses), *experiment_families(self._experiments.now()), *self._live.families()]
        return Response(render(replicas, own), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        """GET /v1/models: base, arms, and every adapter of the store, loaded or not."""
        return Response(await self._models.listing(self._experiment_cards()), media_type="application/json")

    async def model(self, model: str) -> Response:
        """GET /v1/models/{model}."""
        running = [card for card in self._experiment_cards() if card["id"] == model]
        card = running[0] if running else await self._models.card(model)
        if card is None:
            raise await self._models.unknown(model)
        return JSONResponse(card)

    def changing(self, post: Handler) -> Handler:
        """A handler that changes adapters: the next listing of the models reads the store."""

        async def handle(request: Request) -> Response:
            try:
                return await post(request)
            finally:
                self._models.forget()

        return handle

    async def page(self) -> Response:
        """GET /: the live page. It needs no token and shows no data: its script calls /v1 with the user's token."""
        return status.page()

    async def health(self) -> Response:
        """GET /health: the endpoint's process lives. Needs no token and shows nothing else."""
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
        self, kind: Kind, body: ChatRequest | CompletionRequest, request_id: str, live: LiveRequest | None = None
    ) -> Response:
        """Answer a request of either kind; of an experiment, through its `live` request."""
        limits, room, name = self._limits.spec, self._live.spec.engine.max_seq_len, caller.get()
        try:
            arm = live.arm if live else self._catalog.arm(body.model)
        except ApiError:
            raise await self._models.unknown(body.model, [card["id"] for card in self._experiment_cards()]) from None
        salt, max_prompt = "" if name == ANYBODY else name, limits.max_prompt_tokens
        request = arm_request(body, arm, request_id, max_prompt_tokens=max_prompt, cache_salt=salt)
        if body.n > limits.max_n:
            raise bad_request(f"n={body.n}: at most {limits.max_n} answers are given.", param="n")
        longest = request.max_new_tokens or arm.max_new_tokens or room
        size = RequestSize(body.model, size_of(request.question), body.n, longest, room)
        if size.text_bytes > LARGE_PROMPT_BYTES and live is None:
            await self._require_bytes(size.text_bytes, room)
        source = live or self._backend
        headers = {"x-request-id": request_id} | ({"x-graftwork-experiment": live.experiment} if live else {})
        if body.stream:
            chunks = self._limits.metered(name, source.stream(request), size)
            return await _stream(kind, body, arm, request_id, chunks, headers)
        if limits.tokens_per_min is None:
            answers = await source.choices(request)
        else:  # a stream costs more CPU, but of one that the caller leaves the tokens are known
            async with aclosing(self._limits.metered(name, source.stream(request), size)) as chunks:
                answers = [chunk async for chunk in chunks if isinstance(chunk, ArmAnswer)]
            answers.sort(key=attrgetter("index"))
        first = answers[0]
        headers |= identity(arm.name, first.base_digest, first.adapter_version)
        envelope = Envelope(kind, request_id, body.model, first.base_digest)
        return JSONResponse(envelope.build_response(answers), headers=headers)

    async def _require_bytes(self, size: int, room: int) -> None:
        """Refuse here what the replica would: it need not be sent there, where it takes time from the engine."""
        if self._longest_token_bytes is None:
            self._longest_token_bytes = int(await self._backend.call("longest_token_bytes"))
        with as_api_errors():
            require_bytes(size, self._longest_token_bytes, room)

    def _experiment_cards(self) -> list[Json]:
        running = {
            f"{EXPERIMENT}{live.record.spec.name}": int(live.record.started_at) for live in self._experiments.now()
        }
        return [model_card(name, created, kind="experiment") for name, created in running.items()]


async def _stream(
    kind: Kind,
    body: ChatRequest | CompletionRequest,
    arm: ArmSpec,
    request_id: str,
    chunks: AsyncGenerator[StreamChunk],
    headers: dict[str, str],
) -> Response:
    start = await anext(chunks)  # raises what refuses the request, while the status can still be set
    assert isinstance(start, StreamStart), "a stream begins with its start"
    envelope = Envelope(kind, request_id, body.model, start.base_digest)
    headers |= identity(arm.name, start.base_digest, start.adapter_version) | {"cache-control": "no-cache"}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(envelope, chunks, choices=body.n, with_usage=with_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _events(
    envelope: Envelope, chunks: AsyncGenerator[StreamChunk], *, choices: int, with_usage: bool
) -> AsyncIterator[bytes]:
    answers: list[ArmAnswer] = []
    async with aclosing(chunks):
        try:
            for index in range(choices):
                yield sse(envelope.delta("", index=index, first=True))
            async for chunk in chunks:
                if isinstance(chunk, ArmAnswer):
                    answers.append(chunk)
                    yield sse(envelope.last(chunk))
                elif isinstance(chunk, AnswerDelta) and (chunk.text or chunk.logprobs):
                    yield sse(envelope.delta(chunk.text, index=chunk.index, first=False, logprobs=chunk.logprobs))
            if with_usage:
                yield sse(envelope.usage_chunk(answers))
            yield DONE
        except ApiError as error:  # too late for a status: the stream ends with the error, without [DONE]
            yield sse(error.body())


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}: {error.detail}."
    code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
    return JSONResponse(ApiError(error.status_code, asked, code=code).body(), error.status_code, headers=error.headers)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    message = "The endpoint failed on this request; its log says why."
    return JSONResponse(ApiError(500, message, code="internal_error").body(), 500)


_REFS = "#/components/schemas/{model}"
_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT},
            "additionalProperties": False,
        }
    },
}
ERRORS: dict[int | str, Json] = {
    "default": {"description": "An error.", "content": {"application/json": {"schema": ERROR}}}
}
"""For `responses=` of a route: every answer but 200."""


def body_of(model: type[BaseModel]) -> Json:
    """For `openapi_extra=` of a route whose body we parse ourselves."""
    schema = {"$ref": _REFS.format(model=model.__name__)}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def describe(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Have the app's description define these bodies, and what they hold, where `body_of` points."""
    plain = app.openapi

    def openapi() -> Json:
        whole = plain()
        schemas = whole.setdefault("components", {}).setdefault("schemas", {})
        for body in bodies:
            own = body.model_json_schema(ref_template=_REFS)
            schemas |= own.pop("$defs", {})
            schemas[body.__name__] = own
        return whole

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
