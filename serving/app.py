"""An endpoint on the Ray at hand: build it, deploy it, know that it answers, take it down.

Two deployments. The ingress (HTTP, JSON, SSE) is a process of its own, because it must outlive the engine: when an
engine is killed, its requests get OpenAI's error body from the ingress, where Serve's proxy alone sends plain text.
"""

import contextlib
import hashlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from graftwork import base_model
from graftwork.chat import Message
from graftwork.errors import ConfigError, RunError
from graftwork.serving.arms import Sampling, warm
from graftwork.serving.backend import ServeBackend
from graftwork.serving.catalog import base_name
from graftwork.serving.client import AsyncClient, ChatCall, Client
from graftwork.serving.ingress import Ingress
from graftwork.serving.replica import EngineReplica
from graftwork.serving.source import AdapterSource
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage import Store

ENGINE, INGRESS = "engine", "ingress"
READY_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 30.0
PROXY_SLACK_S = 30.0
"""Serve's own timeout comes this much after ours, so that ours answers in OpenAI's shape."""


def build(spec: ServeSpec, *, http: bool = True) -> serve.Application:
    """The Serve application of an endpoint; without `http`, the engine alone, for calls through its handle.

    Relative roots are resolved here, in the driver. Raises ConfigError where `token_env` names an empty variable.
    """
    dump = {**spec.model_dump(mode="json"), "root": Store(spec.root).uri}
    engine = serve.deployment(
        EngineReplica, name=ENGINE, num_replicas=1, max_ongoing_requests=spec.max_ongoing_requests,
        ray_actor_options={"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus},
        health_check_period_s=2, health_check_timeout_s=30,
        graceful_shutdown_timeout_s=10, graceful_shutdown_wait_loop_s=0.1, max_constructor_retry_count=1,
    ).bind(dump)  # fmt: skip
    if not http:
        return engine
    token = _token(spec)
    return serve.deployment(
        serve.ingress()(Ingress), name=INGRESS, num_replicas=1, max_ongoing_requests=4 * spec.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=10, graceful_shutdown_wait_loop_s=0.1,
    ).bind(dump, engine, hashlib.sha256(token.encode()).hexdigest() if token else None)  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    """A deployed endpoint. `url` is None where it was deployed without HTTP."""

    spec: ServeSpec
    url: str | None
    base: str
    """Model name of the base."""
    handle: DeploymentHandle
    """Of the engine: `handle.answer.remote(arm dump, messages, request_id)`."""

    async def ask(self, arm: ArmSpec, messages: Sequence[Mapping[str, str]], request_id: str) -> dict[str, Any]:
        """An arm's answer (`ArmAnswer.dump`) without HTTP; call it hundreds of times at once. Raises ApiError."""
        backend = ServeBackend(self.handle, self.spec.request_timeout_s)
        return await backend.answer(arm.model_dump(mode="json"), list(messages), request_id, Sampling().dump())

    def client(self) -> Client:
        """A client of this endpoint with its token. Close it."""
        assert self.url is not None, "deployed without HTTP"
        return Client(self.url, _token(self.spec), self.spec.request_timeout_s)

    def async_client(self) -> AsyncClient:
        """As `client`, for many questions at once."""
        assert self.url is not None, "deployed without HTTP"
        return AsyncClient(self.url, _token(self.spec), self.spec.request_timeout_s)


@contextlib.contextmanager
def deploy(spec: ServeSpec, *, http: bool = True) -> Iterator[Endpoint]:
    """Serve `spec` on the initialised Ray for the time of the block; entered when it has really answered a request.

    Raises UserError before anything is deployed (base, adapters, arms, token, port in use), RunError when it does not
    start.
    """
    preflight(spec)
    application = build(spec, http=http)
    with _quiet(), _serve_running(spec, http=http):
        try:
            yield _start(spec, application, http=http)
        finally:
            serve.delete(spec.name)


def _start(spec: ServeSpec, application: serve.Application, *, http: bool) -> Endpoint:
    try:
        serve.run(application, name=spec.name, route_prefix="/" if http else None)
    except RuntimeError as error:
        log = "its log is under Ray's session folder"
        raise RunError(f"deploy endpoint {spec.name!r}", _last_line(error), "", log) from error
    handle = serve.get_deployment_handle(ENGINE, app_name=spec.name)
    url = f"http://{_in_url(spec.host)}:{spec.port}" if http else None
    endpoint = Endpoint(spec, url, base_name(spec.base.uri), handle)
    _require_answer(endpoint)
    return endpoint


def preflight(spec: ServeSpec) -> None:
    """Find the user's mistakes here, as typed errors, before a replica would. Raises UserError."""
    base = base_model.resolve(spec.base)
    longest = base.config.get("max_position_embeddings", spec.engine.max_seq_len)
    if spec.engine.max_seq_len > longest:
        raise ConfigError(f"engine.max_seq_len={spec.engine.max_seq_len}", f"the base takes {longest} tokens", "",
                          f"set engine.max_seq_len to {longest} or less")  # fmt: skip
    source = AdapterSource(Store(spec.root), base.digest)
    for ref in dict.fromkeys([*spec.adapters, *(arm.adapter for arm in spec.arms if arm.adapter)]):
        source.resolve(ref)
    for arm in spec.arms:
        warm(arm.prompt, arm.retriever)
    have = ray.cluster_resources()
    for key, wanted in (("CPU", spec.num_cpus), ("GPU", spec.num_gpus)):
        if wanted > have.get(key, 0.0):
            name = f"num_{key.lower()}s"
            found = f"this Ray has {have.get(key, 0.0):g} {key}"
            raise ConfigError(f"{name}={wanted:g}", found, "one engine replica runs on one node",
                              f"lower {name} or take a larger cluster")  # fmt: skip


def _token(spec: ServeSpec) -> str | None:
    if spec.token_env is None:
        return None
    token = os.environ.get(spec.token_env, "")
    if not token:
        raise ConfigError(f"token_env={spec.token_env}", "that environment variable is not set",
                          "it holds the API token", f"export {spec.token_env}=$(openssl rand -hex 24)")  # fmt: skip
    return token


@contextlib.contextmanager
def _serve_running(spec: ServeSpec, *, http: bool) -> Iterator[None]:
    """Have Serve: the one that runs on this Ray already, else our own for the time of the block."""
    if _existing_http(spec, http=http):
        yield
        return
    if http:
        _require_free_port(spec.host, spec.port)
    try:
        serve.start(
            proxy_location="HeadOnly" if http else "Disabled",
            http_options={
                "host": spec.host,
                "port": spec.port,
                "request_timeout_s": spec.request_timeout_s + PROXY_SLACK_S,
            },
        )
        yield
    finally:
        _shut_down()


def _shut_down() -> None:
    """End Serve. `serve.shutdown()` alone leaves "graceful_shutdown failed" on the terminal (Ray 2.60): it waits in a
    call that the controller's own end breaks off. Here the controller is told, and its end awaited."""
    with contextlib.suppress(ValueError, RayActorError):
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(wait=False))
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.05)
    serve.shutdown()


def _existing_http(spec: ServeSpec, *, http: bool) -> bool:
    """Whether Serve runs on this Ray already. Raises ConfigError where it listens elsewhere than the spec says."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    if spec.name in serve.status().applications:
        raise ConfigError(f"name={spec.name}", "an application of this name runs on this Ray already", "",
                          "stop it, or give this endpoint another name")  # fmt: skip
    found = _get_global_client().http_config
    if http and (found.host, found.port) != (spec.host, spec.port):
        raise ConfigError(f"host={spec.host}, port={spec.port}",
                          f"Ray Serve on this Ray listens at {found.host}:{found.port}",
                          "one Ray has one Serve with one address",
                          f"set host: {found.host} and port: {found.port}")  # fmt: skip
    return True


def _require_free_port(host: str, port: int) -> None:
    """Bind and let go of the port on the node that will serve it. Raises ConfigError when it is taken."""
    head = next(
        node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"] and node["Alive"]
    )
    if head == ray.get_runtime_context().get_node_id():
        problem = _bind_problem(host, port)
    else:
        there = NodeAffinitySchedulingStrategy(head, soft=False)
        problem = ray.get(ray.remote(_bind_problem).options(num_cpus=0, scheduling_strategy=there).remote(host, port))
    if problem:
        raise ConfigError(f"port={port} on {host}", problem, "an endpoint needs a port of its own",
                          "stop what listens there, or set another port: --set port=8001")  # fmt: skip


def _bind_problem(host: str, port: int) -> str:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server: a closed connection is no obstacle
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _require_answer(endpoint: Endpoint) -> None:
    """One token from the base, over the way that callers take. Raises RunError when none comes."""
    question = (Message("user", "Hello"),)
    if endpoint.url is None:
        arm = ArmSpec(name="base", max_new_tokens=1).model_dump(mode="json")
        endpoint.handle.answer.remote(arm, [{"role": "user", "content": "Hello"}], "ready").result(
            timeout_s=READY_TIMEOUT_S
        )
        return
    deadline = time.monotonic() + READY_TIMEOUT_S
    with endpoint.client() as client:
        while not client.health():
            if time.monotonic() > deadline:
                raise RunError(f"endpoint {endpoint.url}", f"GET /health gave no 200 within {READY_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        client.chat(ChatCall(endpoint.base, question, max_tokens=1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Serve tells each of its steps at INFO in the driver; warnings still come through."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _in_url(host: str) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__).strip()
