"""Hooks into Ray Serve: its controller, its address, and the order in which its router answers calls.

Checked with Ray 2.60. Imports ray.serve: only modules that serve import this one.
"""

from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


def controller() -> Any:
    """Return the actor that runs Serve on this Ray. Raises ValueError where Serve does not run.

    `serve.status()`, the public way to ask, starts Serve where it does not run. Upstream: the actor's name,
    `SERVE_CONTROLLER_NAME` and `SERVE_NAMESPACE` of `ray.serve._private.constants`.
    """
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def end_serve() -> None:
    """Ask the controller to end Serve and all its applications; return once it has taken the request.

    For a replica, which ends with Serve and so can't wait for the end, as `serve.shutdown()` does. Asked once: Ray
    would repeat a call whose answer the controller's end breaks off. Raises ValueError or RayActorError where Serve
    has ended. Upstream: the controller's method `graceful_shutdown(wait)`.
    """
    ray.get(controller().graceful_shutdown.options(max_task_retries=0).remote(wait=False))


def delete_application(name: str) -> None:
    """Ask for the end of an application without waiting for it.

    For a replica of that application, which the end includes. Upstream: `serve.delete(name, _blocking=False)`.
    """
    serve.delete(name, _blocking=False)


def http_address() -> tuple[str, int]:
    """Return (host, port) that the HTTP proxies of the running Serve listen at.

    Upstream: `ray.serve.context._get_global_client().http_config`; Serve's public status does not name them.
    """
    options = _get_global_client().http_config
    return str(options.host), int(options.port)


def calls_by_value(handle: DeploymentHandle) -> DeploymentHandle:
    """Return a handle whose calls go from process to process by gRPC, not through Ray's object store.

    A stream of 32 tokens costs half the CPU (serving/router.py has the figures). Upstream: `_by_reference` of
    `DeploymentHandle.options`; Ray's public switch, RAY_SERVE_USE_GRPC_BY_DEFAULT, changes every handle.
    """
    return handle.options(_by_reference=False)


class TwinSafeRouter(RequestRouter):  # type: ignore[misc]  # Ray carries no types
    """Request router that gives a chosen replica to the call that it was chosen for.

    Ray finds that call by `internal_request_id`, which two calls of one HTTP request share: the index has the later
    call alone, and the earlier one would wait permanently (tests/unit/compat/test_ray_serve.py). Upstream: override of
    `RequestRouter._fulfill_next_pending_request`, with `_get_pending_request_matching_internal_request_id`,
    `_pending_requests_to_fulfill` and `_pending_requests_by_id`.
    """

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        if self._get_pending_request_matching_internal_request_id(request_metadata) is None:
            twin = next((p for p in self._pending_requests_to_fulfill if _waits_as(p, request_metadata)), None)
            if twin is not None:
                self._pending_requests_by_id[request_metadata.internal_request_id] = twin
        super()._fulfill_next_pending_request(replica, request_metadata)


def _waits_as(request: PendingRequest, metadata: Any) -> bool:
    same = request.metadata.internal_request_id == metadata.internal_request_id
    return same and not request.future.done()
