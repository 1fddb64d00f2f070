"""Life of Ray Serve around an endpoint: started on a free port, shut down with the driver that deployed it.

Serve itself keeps an endpoint whose driver was killed, so each engine replica checks that its owner lives. An endpoint
that a Serve config deployed has no owner.
"""

import asyncio
import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from graftwork import errors
from graftwork.compat.ray import job_has_ended, table_get, table_put
from graftwork.compat.ray_serve import controller, delete_application, end_serve, http_address
from graftwork.errors import ConfigError, GraftworkError, RunError
from graftwork.serving.spec import ServeSpec

log = logging.getLogger("ray.serve")
OWNER_POLL_INTERVAL_S = 2.0
_SPACE = "graftwork-endpoints"


def this_driver() -> str:
    """Its id on this Ray."""
    return str(ray.get_runtime_context().get_job_id())


def claim(app: str) -> None:
    """Write down that this driver owns an application."""
    table_put(_SPACE, app, this_driver())


async def end_with(owner: str, app: str) -> None:
    """Delete the application once its owner has ended, and Serve with it where nothing else is served."""
    while not await asyncio.to_thread(job_has_ended, owner):
        await asyncio.sleep(OWNER_POLL_INTERVAL_S)
    log.warning("the driver %s of %r has ended: the endpoint goes", owner, app)
    await asyncio.to_thread(_delete, app)


def _delete(app: str) -> None:
    if set(serve.status().applications) - {app}:
        delete_application(app)
        return
    try:
        end_serve()
    except (ValueError, RayActorError):
        return  # another replica was quicker


SHUTDOWN_TIMEOUT_S = 30.0
PROXY_SLACK_S = 30.0
"""Serve's own timeout comes this much after ours, so that ours answers in OpenAI's shape."""
_RAISED = re.compile(r"graftwork\.errors\.(\w+): \1: (.*?)(?:\n  Rule: (.*?))?(?:\n  Hint: (.*?))?\s*\Z", re.DOTALL)


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
        shut_down()


def shut_down() -> None:
    """End Serve with its applications: ask the controller, and wait up to SHUTDOWN_TIMEOUT_S for its end.

    `serve.shutdown()` alone waits in a call that the controller's end breaks off, and that Ray then repeats (2.60).
    """
    with contextlib.suppress(ValueError, RayActorError):
        end_serve()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
        while time.monotonic() < deadline:
            controller()
            time.sleep(0.05)
    serve.shutdown()


def _existing_http(spec: ServeSpec, *, http: bool) -> bool:
    """Return True where Serve runs on this Ray already. Raises ConfigError where it listens at another address."""
    try:
        controller()
    except ValueError:
        return False
    owner = table_get(_SPACE, spec.name)
    if spec.name in serve.status().applications and owner is not None and job_has_ended(owner):
        serve.delete(spec.name)
    if spec.name in serve.status().applications:
        raise ConfigError(
            f"name={spec.name}",
            "an application of this name runs on this Ray already",
            "",
            "stop it, or give this endpoint another name",
        )
    host, port = http_address()
    if http and (host, port) != (spec.host, spec.port):
        raise ConfigError(
            f"host={spec.host}, port={spec.port}",
            f"Ray Serve on this Ray listens at {host}:{port}",
            "one Ray has one Serve with one address",
            f"set host: {host} and port: {port}",
        )
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
        require_port_here(host, port)
        return
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    probe = ray.remote(_bind_problem).options(num_cpus=0, scheduling_strategy=there)
    _refuse_port(host, port, ray.get(probe.remote(host, port)))


def _refuse_port(host: str, port: int, problem: str) -> None:
    if problem:
        raise ConfigError(
            f"port={port} on {host}",
            problem,
            "an endpoint needs a port of its own",
            "stop what listens there, or set another port: --set port=8001",
        )


def _bind_problem(host: str, port: int) -> str:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # as the server: a closed connection is no obstacle
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""


@contextlib.contextmanager
def silence_serve_logs() -> Iterator[None]:
    """Silence Serve's INFO lines in the driver; warnings still come through."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


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
