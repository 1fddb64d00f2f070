"""Deployment of an endpoint on a running Ray: build it, deploy it, wait for its first answer, take it down.

Two deployments. The ingress (HTTP, JSON, SSE) is a process of its own, because it must outlive the engine: when an
engine is killed, its requests get OpenAI's error body from the ingress, where Serve's proxy alone sends plain text.
The embedder is a third deployment, so that no decode step waits for it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from graftwork.base import load
from graftwork.base.support import check_serving
from graftwork.cluster.kuberay.objects import INGRESS_PER_ENGINE
from graftwork.config import validate
from graftwork.errors import ConfigError, RunError
from graftwork.planning.hardware import accelerators_here, with_gpus
from graftwork.prompts.render import Message
from graftwork.retrieval.embedder import Embedded, Embedder, EmbedderSpec, TextTooLong, resolve_embedder
from graftwork.serving.api.app import Ingress
from graftwork.serving.api.auth import keys_of, own_token
from graftwork.serving.api.errors import bad_request
from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.arms import base_name, check_arms, warm
from graftwork.serving.client import AsyncClient, ChatCall, Client
from graftwork.serving.engine.grammar import check, read_grammar
from graftwork.serving.messages import ArmAnswer, ArmRequest, Likelihood
from graftwork.serving.models import AdapterSource
from graftwork.serving.ray_serve_lifecycle import claim, serve_running, silence_serve_logs, start_failure, this_driver
from graftwork.serving.replica import EngineReplica
from graftwork.serving.router import ServeBackend
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import Store

ENGINE, INGRESS, EMBEDDER = "engine", "ingress", "embedder"
READY_TIMEOUT_S = 60.0
ROUTING_STATS_PERIOD_S = 1.0
"""Period in which each replica reports the adapters that it has loaded."""


def build(spec: ServeSpec, *, http: bool = True, owner: str | None = None, follows: bool = False) -> serve.Application:
    """The Serve application of an endpoint; without `http`, the engine alone, for calls through its handle.

    owner: the driver that it goes with. follows: what is live comes as `user_config`, and outlives replicas.
    Relative roots are resolved here, in the driver. Raises ConfigError where `token_env` names an empty variable.
    """
    roots = [Store(root).uri for root in spec.adapter_roots]
    dump = {**spec.model_dump(mode="json"), "root": Store(spec.root).uri, "adapter_roots": roots}
    scale: Json = {"num_replicas": spec.num_replicas}
    if spec.autoscaling is not None:
        scale = {"num_replicas": "auto", "autoscaling_config": spec.autoscaling.model_dump()}
    engine = serve.deployment(
        EngineReplica,
        name=ENGINE,
        **scale,
        max_ongoing_requests=spec.max_ongoing_requests,
        ray_actor_options={"num_cpus": spec.num_cpus, "num_gpus": spec.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="graftwork.serving.router:AdapterRouter",
            # an eighth of a batch more costs the others little: a decode step mostly reads weights (docs/log.md)
            request_router_kwargs={"free_load": max(1, spec.engine.max_batch // 8)},
            request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,
        ),
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=spec.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
    ).bind(dump, owner, follows)
    if not http:
        return engine
    embedder = _embedder(spec.embedder) if spec.embedder else None
    return serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=1,
        max_constructor_retry_count=1,
        max_ongoing_requests=INGRESS_PER_ENGINE * spec.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=spec.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
    ).bind(dump, engine, keys_of(spec), embedder)


def _embedder(spec: EmbedderSpec) -> serve.Application:
    return serve.deployment(
        EmbedderReplica,
        name=EMBEDDER,
        num_replicas=1,
        ray_actor_options={"num_cpus": spec.num_cpus},
        max_ongoing_requests=256,
        max_constructor_retry_count=1,
    ).bind(spec.model_dump(mode="json"))


@dataclass(frozen=True)
class Endpoint:
    """A deployed endpoint. `url` is None where it was deployed without HTTP."""

    spec: ServeSpec
    url: str | None
    base: str
    """Model name of the base."""
    handle: DeploymentHandle
    """Of the engine: `handle.choices.remote(ArmRequest(arm, messages, request_id))`."""

    async def ask(self, arm: ArmSpec, messages: Sequence[Message], request_id: str) -> ArmAnswer:
        """Return an arm's answer without HTTP; call it hundreds of times at once. Raises ApiError."""
        return (await self._backend.choices(ArmRequest(arm, tuple(messages), request_id)))[0]

    async def likelihood(
        self, arm: ArmSpec, messages: Sequence[Message], continuations: Sequence[str], request_id: str
    ) -> list[Likelihood]:
        """Return how likely the arm is to answer with each text, in order. Raises ApiError."""
        return await self._backend.likelihood(arm, tuple(messages), list(continuations), request_id)

    @cached_property
    def _backend(self) -> ServeBackend:
        """One for all questions: each has a router of its own, which polls Serve's controller."""
        return ServeBackend(self.handle, self.spec.request_timeout_s)

    def client(self) -> Client:
        """A client of this endpoint with its token. Close it."""
        return Client(*self._address())

    def async_client(self) -> AsyncClient:
        """As `client`, for many questions at once."""
        return AsyncClient(*self._address())

    def _address(self) -> tuple[str, str | None, float]:
        """URL, the admin's token or the first user's, time limit."""
        assert self.url is not None, "deployed without HTTP"
        admin = own_token(self.spec.admin_token_env, "admin_token_env")
        return self.url, admin or own_token(self.spec.token_env, "token_env"), self.spec.request_timeout_s


@contextlib.contextmanager
def deploy(spec: ServeSpec, *, http: bool = True) -> Iterator[Endpoint]:
    """Serve `spec` on the initialised Ray for the time of the block; entered when it has really answered a request.

    Raises UserError before anything is deployed (base, adapters, arms, token, port in use), RunError when it does not
    start.
    """
    spec, _ = with_gpus(spec, accelerators_here())
    preflight(spec)
    application = build(spec, http=http, owner=this_driver())
    with silence_serve_logs(), serve_running(spec, http=http):
        claim(spec.name)
        try:
            serve.run(application, name=spec.name, route_prefix="/" if http else None)
        except RuntimeError as error:
            raise start_failure(spec.name, error) from error
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(spec.host, spec.host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{spec.port}" if http else None
        handle = serve.get_deployment_handle(ENGINE, app_name=spec.name)
        endpoint = Endpoint(spec, url, base_name(spec.base.uri), handle)
        _require_answer(endpoint)
        yield endpoint


def check_spec(spec: ServeSpec) -> None:
    """Check base, adapters, arms and embedder as far as no Ray is needed. Raises UserError."""
    base = load.resolve(spec.base)
    check_serving(spec)
    longest = base.config.get("max_position_embeddings", spec.engine.max_seq_len)
    if spec.engine.max_seq_len > longest:
        raise ConfigError(
            f"engine.max_seq_len={spec.engine.max_seq_len}",
            f"the base takes {longest} tokens",
            "",
            f"set engine.max_seq_len to {longest} or less",
        )
    source = AdapterSource(Store(spec.root), base.digest)
    for ref in dict.fromkeys([*spec.adapters, *(arm.adapter for arm in spec.arms if arm.adapter)]):
        source.resolve(ref)
    for arm in spec.arms:
        warm(arm.prompt, arm.retriever)
        if arm.grammar is not None:
            check(read_grammar(arm.grammar))
    check_arms([spec.base_arm, *spec.arms], lambda: load.template(base))
    if spec.embedder:
        resolve_embedder(spec.embedder)


def preflight(spec: ServeSpec) -> None:
    """Check the spec, and that this Ray has room for it, before a replica starts. Raises UserError."""
    check_spec(spec)
    require_resources(spec.num_cpus, spec.gpus, spec.first_replicas)
    if spec.embedder:
        _require_embedder_cpus(spec, spec.embedder)


def _require_embedder_cpus(spec: ServeSpec, embedder: EmbedderSpec) -> None:
    have, engines = ray.cluster_resources().get("CPU", 0.0), spec.first_replicas * spec.num_cpus
    if engines + embedder.num_cpus > have:
        raise ConfigError(
            f"embedder.num_cpus={embedder.num_cpus:g} next to {engines:g} of the engine",
            f"this Ray has {have:g} CPU",
            "the embedder is a process of its own, with its own share",
            f"set num_cpus to {max(have - embedder.num_cpus, 1) / spec.first_replicas:g} or less, "
            "or embedder.num_cpus lower",
        )


def require_resources(num_cpus: float, num_gpus: float, replicas: int = 1) -> None:
    """Raises ConfigError for what this Ray does not have: Ray itself would wait for it without end."""
    have = ray.cluster_resources()
    for key, each in (("CPU", num_cpus), ("GPU", num_gpus)):
        if each * replicas > have.get(key, 0.0):
            name, times = f"num_{key.lower()}s", f" for each of {replicas} replicas" if replicas > 1 else ""
            found = f"this Ray has {have.get(key, 0.0):g} {key}"
            raise ConfigError(
                f"{name}={each:g}{times}",
                found,
                "one engine runs on one node",
                f"lower {name} or take a larger cluster",
            )


def _require_answer(endpoint: Endpoint) -> None:
    """One token from the base, over the way that callers take. Raises RunError when none comes."""
    question = (Message("user", "Hello"),)
    if endpoint.url is None:
        arm = ArmSpec(name="base", max_new_tokens=1)
        endpoint.handle.choices.remote(ArmRequest(arm, question, "ready")).result(timeout_s=READY_TIMEOUT_S)
        return
    deadline = time.monotonic() + READY_TIMEOUT_S
    with endpoint.client() as client:
        while not client.ready():
            if time.monotonic() > deadline:
                raise RunError(f"endpoint {endpoint.url}", f"GET /ready gave no 200 within {READY_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        client.chat(ChatCall(endpoint.base, question, max_tokens=1))


T = TypeVar("T")


class EmbedderReplica:
    """Turns texts into vectors, one call at a time: each call is a batch already."""

    async def __init__(self, spec: Json) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._spec = EmbedderSpec.model_validate(spec)
        self._thread = ThreadPoolExecutor(1, "embed")
        self._embedder: Embedder = await self._run(self._load)
        await self._run(partial(self._embedder.embed, ["ready"]))

    async def embed(self, texts: list[str]) -> Embedded:
        """Vectors in the order of the texts. Raises ApiError 400 for a text that is too long."""
        try:
            return await self._run(partial(self._embedder.embed, texts))
        except TextTooLong as error:
            message = f"input: {error.subject} has {error.problem}; {error.rule}. {error.hint.capitalize()}."
            raise bad_request(message, param="input", code="context_length_exceeded") from None

    def _load(self) -> Embedder:
        import torch

        torch.set_num_threads(max(1, int(self._spec.num_cpus)))
        return Embedder(resolve_embedder(self._spec))

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def app(args: Mapping[str, Any]) -> serve.Application:
    """Return the endpoint that Ray Serve imports from a Serve config (cluster/kuberay/objects.py), on a RayService.

    Serve calls this in a task of the cluster; what is live comes later, to the ingress as its `user_config`.
    args: `{"spec": the serve spec without its live keys}`. Raises ConfigError: a wrong spec, keys not set.
    """
    return build(validate(ServeSpec, args["spec"], where="args.spec"), follows=True)
