"""Hooks into Ray Serve, on a real Serve with its HTTP proxy."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from graftwork.cluster.private_ray import private_ray
from graftwork.compat import ray_serve
from tests.ports import free_port
from tests.waiting import until


class Echo:
    """Returns its argument."""

    def __call__(self, said: Any) -> str:
        return "hello"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    if ray.is_initialized():  # tests/ray ran before in this process
        yield port
        return
    with private_ray(num_cpus=3):
        yield port


def gone() -> bool:
    try:
        ray_serve.controller()
    except ValueError:
        return True
    return False


@pytest.mark.long
def test_serve_is_found_asked_and_ended(port: int) -> None:
    assert gone(), "asking does not start Serve"
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    for name in ("one", "two"):
        application = serve.deployment(Echo).options(ray_actor_options={"num_cpus": 0}).bind()
        serve.run(application, name=name, route_prefix=f"/{name}")
    assert not gone()
    assert ray_serve.http_address() == ("127.0.0.1", port)
    assert httpx.get(f"http://127.0.0.1:{port}/one").text == "hello"
    handle = serve.get_deployment_handle("Echo", app_name="two")
    direct = ray_serve.calls_by_value(handle)
    assert (handle.handle_options._by_reference, direct.handle_options._by_reference) == (True, False)
    assert direct.remote(None).result() == "hello"
    began = time.monotonic()
    ray_serve.delete_application("one")
    assert time.monotonic() - began < 1, "does not wait; Ray's own wait looks once a second"
    until(lambda: "one" not in serve.status().applications, within_s=30)
    assert "two" in serve.status().applications
    ray_serve.end_serve()
    until(gone, within_s=30)
    with pytest.raises((ValueError, RayActorError)):
        ray_serve.end_serve()
    serve.shutdown()


class OfRay(RequestRouter):  # type: ignore[misc]
    """Ray's own, to compare with."""

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> list[list[RunningReplica]]:
        return [candidate_replicas]


class OfOurs(ray_serve.TwinSafeRouter):
    """With the hook."""

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> list[list[RunningReplica]]:
        return [candidate_replicas]


async def answered_twins(kind: type[RequestRouter]) -> list[bool]:
    """Two calls of one HTTP request wait in the router, then a replica is found for each; which calls get theirs."""
    router = kind(DeploymentID("deployment"), DeploymentHandleSource.REPLICA)
    twins = [PendingRequest(args=[], kwargs={}, metadata=RequestMetadata("id", "internal")) for _ in range(2)]
    waiting = [asyncio.ensure_future(router._choose_replica_for_request(twin)) for twin in twins]
    await asyncio.sleep(0)
    for replica in ("replica 1", "replica 2"):
        router._fulfill_next_pending_request(replica, twins[0].metadata)
    await asyncio.wait(waiting, timeout=1)
    answered = [one.done() for one in waiting]
    for one in waiting:
        one.cancel()
    return answered


def test_both_calls_of_a_request_get_a_replica_with_the_hook_alone(port: int) -> None:
    """The second assertion fails when Ray no longer needs the hook."""
    assert ray.is_initialized()
    assert asyncio.run(answered_twins(OfOurs)) == [True, True]
    assert asyncio.run(answered_twins(OfRay)) == [True, False]
