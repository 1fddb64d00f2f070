"""Routing of requests to engine replicas: calls through Ray Serve, failures as ApiErrors, replicas by adapter.

`AdapterRouter` runs in the process that calls (the ingress). Ray Serve makes one router per handle and gives it the
replicas, what each last recorded (`EngineReplica.record_routing_stats`) and how many requests each holds. The adapter
comes with the call as its `multiplexed_model_id`; a call without one is for the base, which every replica has.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from graftwork.compat.ray_serve import TwinSafeRouter, calls_by_value
from graftwork.retrieval.embedder import Embedded
from graftwork.serving.api.errors import ApiError, engine_lost
from graftwork.serving.messages import ArmAnswer, ArmRequest, Likelihood, Question, StreamChunk
from graftwork.serving.spec import ArmSpec

log = logging.getLogger("ray.serve")


class EngineBackend(Protocol):
    """The engine side, as the ingress calls it. All raise ApiError."""

    async def choices(self, request: ArmRequest) -> list[ArmAnswer]:
        """See EngineReplica.choices."""

    def stream(self, request: ArmRequest) -> AsyncGenerator[StreamChunk]:
        """See EngineReplica.stream. Closing it ends the request in the engine."""

    async def call(self, method: str, *args: Any) -> Any:
        """A method of one replica: models, registry."""

    async def embed(self, texts: list[str]) -> Embedded:
        """See EmbedderReplica.embed; only where the endpoint has an embedder."""

    async def each(self, method: str, *args: Any) -> list[Any]:
        """A method of every live replica: refresh, registry, adapters, stats, ready. At least one has answered."""


class ServeBackend:
    """Calls over a DeploymentHandle. Retries nothing: a request whose engine died is the caller's to send again.

    They go straight from process to process by gRPC (`calls_by_value`), not through Ray's object store: a stream
    of 32 tokens then costs half the CPU (48 instead of 94 ms over all processes, 64 streams at once, 2 cores).
    """

    def __init__(self, handle: DeploymentHandle, timeout_s: float, embedder: DeploymentHandle | None = None) -> None:
        self._handle, self._timeout_s = calls_by_value(handle), timeout_s
        # Broadcasts go through a router of their own: Ray 2.60 counts them in the load of each replica and renews that
        # count's 10 s life, so that a count gone astray would keep requests away for as long as somebody polls.
        self._control = calls_by_value(DeploymentHandle(handle.deployment_name, handle.app_name))
        self._embedder = calls_by_value(embedder) if embedder is not None else None

    async def choices(self, request: ArmRequest) -> list[ArmAnswer]:
        """All answers of a request. Cancelling the call cancels the request in the engine."""
        async with _api_call(self._timeout_s):
            call = self._handle.options(method_name="choices", multiplexed_model_id=request.arm.adapter or "")
            answers: list[ArmAnswer] = await call.remote(request)
            return answers

    async def likelihood(
        self, arm: ArmSpec, question: Question, continuations: Sequence[str], request_id: str
    ) -> list[Likelihood]:
        """See EngineReplica.likelihood."""
        async with _api_call(self._timeout_s):
            call = self._handle.options(method_name="likelihood", multiplexed_model_id=arm.adapter or "")
            found: list[Likelihood] = await call.remote(arm, question, continuations, request_id)
            return found

    async def stream(self, request: ArmRequest) -> AsyncGenerator[StreamChunk]:
        """Chunks as the replica yields them."""
        deadline = time.monotonic() + self._timeout_s
        model = request.arm.adapter or ""
        call = self._handle.options(method_name="stream", stream=True, multiplexed_model_id=model)
        chunks = call.remote(request)
        try:
            while True:
                async with _api_call(deadline - time.monotonic()):  # one wait: a timeout must not span a yield
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            chunks.cancel()  # no effect on one that has ended

    async def call(self, method: str, *args: Any) -> Any:
        """A method on one replica."""
        async with _api_call(self._timeout_s):
            return await getattr(self._handle, method).remote(*args)

    async def embed(self, texts: list[str]) -> Embedded:
        """Vectors of the endpoint's embedder."""
        assert self._embedder is not None, "the ingress has refused it"
        async with _api_call(self._timeout_s):
            found: Embedded = await self._embedder.embed.remote(texts)
            return found

    async def each(self, method: str, *args: Any) -> list[Any]:
        """Call every replica. One that ended meanwhile is left out: the one in its place reads every alias again. Else
        the first error is raised."""
        async with _api_call(self._timeout_s):
            found = await self._control.broadcast(method, *args).results_async(return_exceptions=True)
            lost = [result for result in found if isinstance(result, RayActorError)]
            failed = [result for result in found if isinstance(result, BaseException) and result not in lost]
            if failed or len(lost) == len(found):
                raise (failed or lost)[0]
            return [result for result in found if result not in lost]


@contextlib.asynccontextmanager
async def _api_call(timeout_s: float) -> AsyncIterator[None]:
    """Limit the time of the block; Ray's failures leave as ApiErrors."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise ApiError(504, "The request took longer than this endpoint allows.", code="request_timeout") from None
    except RayActorError as error:
        raise engine_lost(type(error).__name__) from error
    except (BackPressureError, DeploymentUnavailableError) as error:
        raise ApiError(503, "The endpoint takes no requests now. Try again.", code="overloaded") from error
    except RayTaskError as error:
        if isinstance(error.cause, ApiError):
            raise error.cause from None
        log.exception("an engine replica failed on a request")
        raise ApiError(500, "The endpoint failed on this request; its log says why.", code="internal_error") from error


RESIDENTS = "residents"
"""Key of the routing stats: the references (`task@alias`, `task@version`) a replica answers without loading."""
BALANCE = 1.25
"""A replica is preferred while it holds at most this multiple of the mean load (consistent hashing with bounded loads,
Mirrokni, Thorup and Zadimoghaddam, arXiv 1608.01350: a factor of 1.25 keeps most of the affinity)."""


class AdapterRouter(TwinSafeRouter):
    """Prefers replicas that hold the adapter, the emptier of two of them; others when those are overloaded.

    A cold adapter's home is the first of its rendezvous order (Thaler and Ravishankar 1998), so that all callers send
    its first requests to one replica, and one replica more or less moves few homes.
    """

    queue_len_response_deadline_s = 1.0
    """Ray's 0.1 s is missed, with a warning on the terminal, where a replica's engine and event loop share cores."""

    def initialize_state(self, *, free_load: int) -> None:
        """free_load: requests that a replica takes on at no loss to the others: it decodes them in one batch."""
        self._free_load = free_load

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks: Ray Serve takes the emptiest of the first rank that has a place free, else goes to the next."""
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True  # all are ranked: when all are full, wait a little
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not adapter:
            return [random.sample(candidate_replicas, len(candidate_replicas))]
        loads = {name: self._load(replica.replica_id) for name, replica in by_name.items()}
        residents = [name for name, replica in by_name.items() if adapter in replica.routing_stats.get(RESIDENTS, ())]
        ranks = rank(adapter, loads, residents, free_load=self._free_load)
        return [[by_name[name] for name in names] for names in ranks]

    def _load(self, replica: ReplicaID) -> int:
        """Requests that the replica holds; 0 where it has not reported for a while, which means it is idle."""
        return self.replica_queue_len_cache.get(replica) or 0


def rank(
    adapter: str,
    loads: Mapping[str, int],
    residents: Iterable[str],
    *,
    free_load: int,
    chance: random.Random | None = None,
) -> list[list[str]]:
    """Replica names in the order of preference; within a rank the emptiest is taken.

    loads: requests that each replica holds. First two of the residents that are not overloaded, drawn at random;
    without one, the first of the rendezvous order that is not overloaded; then everybody else.
    """
    limit = max(free_load, math.ceil(BALANCE * (sum(loads.values()) + 1) / max(len(loads), 1)))
    order = rendezvous(adapter, loads)
    near = [name for name in residents if loads[name] < limit]
    first = (
        (chance or random).sample(near, min(2, len(near))) or [n for n in order if loads[n] < limit][:1] or order[:1]
    )
    rest = [name for name in order if name not in first]
    return [first, rest] if rest else [first]


def rendezvous(key: str, names: Iterable[str]) -> list[str]:
    """The names from the highest to the lowest hash of (key, name): taking one away moves no other."""
    return sorted(
        names, key=lambda name: hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest(), reverse=True
    )
