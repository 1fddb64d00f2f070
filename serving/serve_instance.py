"""Ray Serve itself: had for the time of an endpoint, on a port that is free, and gone afterwards."""

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private import client as serve_client
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.router import SharedRouterLongPollClient, SingletonThreadRouter
from ray.serve.context import _get_global_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from graftwork import errors
from graftwork.errors import ConfigError, GraftworkError, RunError
from graftwork.serving.owner import is_orphan
from graftwork.serving.spec import ServeSpec

SHUTDOWN_TIMEOUT_S = 30.0
LAST_NEWS_TIMEOUT_S = 5.0
POLL_S = 0.1
PROXY_SLACK_S = 30.0
"""Serve's own timeout comes this much after ours, so that ours answers in OpenAI's shape."""
_RAISED = re.compile(r"graftwork\.errors\.(\w+): \1: (.*?)(?:\n  Rule: (.*?))?(?:\n  Next: (.*?))?\s*\Z", re.DOTALL)


@contextlib.contextmanager
def serve_running(spec: ServeSpec, *, http: bool) -> Iterator[None]:
    """Have Serve for an endpoint: the one that runs on this Ray already, else our own for the time of the block. The
    endpoint's application goes with the block.

    Raises ConfigError: port in use, Serve listening elsewhere, the endpoint's name taken.
    """
    if _existing_http(spec, http=http):
        try:
            yield
        finally:
            serve.delete(spec.name)
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
        shut_down(spec.name)


def shut_down(name: str) -> None:
    """End the application `name`, then Serve. `serve.shutdown()` alone leaves "graceful_shutdown failed" on the
    terminal (Ray 2.60): it waits in a call that the controller's own end breaks off. Here the controller is told, and
    its end awaited."""
    with contextlib.suppress(ValueError, RayActorError):
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        open_questions = _stop_listening()
        serve.delete(name)
        if open_questions:
            ray.wait(open_questions, num_returns=len(open_questions), timeout=LAST_NEWS_TIMEOUT_S)
        # it may go before its answer is here: told once, for Ray says on the terminal that it asks again
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(wait=False))
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.05)
    serve.shutdown()


def _stop_listening() -> list[ray.ObjectRef[object]]:
    """Let this process ask the controller for news no more; returns the questions that are still open.

    They end with the news that the application goes. One that is open when the controller itself goes leaves "Task
    ServeController.listen_for_change failed" on the terminal (Ray 2.60).
    """
    loop = SingletonThreadRouter._asyncio_loop
    if loop is None:
        return []
    shared = SharedRouterLongPollClient.get_or_create(_get_global_client()._controller, loop)
    routers = [router for routers in list(shared.routers.values()) for router in list(routers)]
    clients = [shared.long_poll_client, *(router.long_poll_client for router in routers)]
    for client in clients:
        client.stop()
    return [client._current_ref for client in clients if hasattr(client, "_current_ref")]


def _existing_http(spec: ServeSpec, *, http: bool) -> bool:
    """Whether Serve runs on this Ray already. Raises ConfigError where it listens elsewhere than the spec says."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    if spec.name in serve.status().applications and is_orphan(spec.name):
        serve.delete(spec.name)
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


def require_port_here(host: str, port: int) -> None:
    """Bind the port on this machine and release it. Raises ConfigError when it is taken."""
    _refuse_port(host, port, _bind_problem(host, port))


def _require_free_port(host: str, port: int) -> None:
    """Bind the port on the head node, which serves it, and release it. Raises ConfigError when it is taken."""
    head = next(
        node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"] and node["Alive"]
    )
    if head == ray.get_runtime_context().get_node_id():
        return require_port_here(host, port)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    probe = ray.remote(_bind_problem).options(num_cpus=0, scheduling_strategy=there)
    _refuse_port(host, port, ray.get(probe.remote(host, port)))


def _refuse_port(host: str, port: int, problem: str) -> None:
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Serve tells each of its steps at INFO in the driver; warnings still come through."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def attentive() -> Iterator[None]:
    """Look each tenth of a second whether an application runs or is gone: Serve's own client looks once a second."""
    before = serve_client.CLIENT_POLLING_INTERVAL_S
    serve_client.CLIENT_POLLING_INTERVAL_S = POLL_S
    try:
        yield
    finally:
        serve_client.CLIENT_POLLING_INTERVAL_S = before


def start_failure(name: str, error: RuntimeError) -> GraftworkError:
    """Why the application `name` did not start: the error that its constructor raised, of the same type."""
    found = serve.status().applications.get(name)
    texts = [deployment.message for deployment in found.deployments.values() if deployment.message] if found else []
    text = texts[0].strip() if texts else str(error)
    raised = _RAISED.search(text)
    if raised is None:
        last_line = text.splitlines()[-1].strip() if text else type(error).__name__
        return RunError(f"deploy endpoint {name!r}", last_line, "", "its log is under Ray's session folder")
    kind: type[GraftworkError] = getattr(errors, raised[1])
    return kind(f"deploy endpoint {name!r}: {raised[2]}", "", raised[3] or "", raised[4] or "")
