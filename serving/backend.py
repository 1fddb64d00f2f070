"""The engine replicas as the ingress sees them: calls through Ray Serve, failures as ApiErrors."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from graftwork.compat.ray_serve import calls_by_value
from graftwork.embedding import Embedded
from graftwork.serving.api_error import ApiError, engine_lost
from graftwork.serving.arms import Dump, Question

log = logging.getLogger("ray.serve")


class EngineBackend(Protocol):
    """What the ingress needs from the engine side. All raise ApiError."""

    async def choices(self, arm: Dump, messages: Question, request_id: str, sampling: Dump) -> list[Dump]:
        """See EngineReplica.choices."""

    def stream(self, arm: Dump, messages: Question, request_id: str, sampling: Dump) -> AsyncGenerator[Dump]:
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

    async def answer(self, arm: Dump, messages: Question, request_id: str, sampling: Dump) -> Dump:
        """The first of `choices`."""
        return (await self.choices(arm, messages, request_id, sampling))[0]

    async def likelihood(
        self, arm: Dump, messages: Question, continuations: Sequence[str], request_id: str
    ) -> list[Dump]:
        """See EngineReplica.likelihood."""
        with _as_api_errors():
            async with asyncio.timeout(self._timeout_s):
                call = self._handle.options(method_name="likelihood", multiplexed_model_id=_adapter(arm))
                told: list[Dump] = await call.remote(arm, messages, continuations, request_id)
                return told

    async def choices(self, arm: Dump, messages: Question, request_id: str, sampling: Dump) -> list[Dump]:
        """Cancelling this cancels the request in the engine."""
        with _as_api_errors():
            async with asyncio.timeout(self._timeout_s):
                call = self._handle.options(method_name="choices", multiplexed_model_id=_adapter(arm))
                answers: list[Dump] = await call.remote(arm, messages, request_id, sampling)
                return answers

    async def stream(self, arm: Dump, messages: Question, request_id: str, sampling: Dump) -> AsyncGenerator[Dump]:
        """Chunks as the replica yields them."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        call = self._handle.options(method_name="stream", stream=True, multiplexed_model_id=_adapter(arm))
        chunks = call.remote(arm, messages, request_id, sampling)
        try:
            while True:
                with _as_api_errors():
                    async with asyncio.timeout_at(deadline):  # around one wait: a timeout must not span a yield
                        chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            chunks.cancel()  # no effect on one that has ended

    async def call(self, method: str, *args: Any) -> Any:
        """A method on one replica."""
        with _as_api_errors():
            async with asyncio.timeout(self._timeout_s):
                return await getattr(self._handle, method).remote(*args)

    async def embed(self, texts: list[str]) -> Embedded:
        """Vectors of the endpoint's embedder."""
        assert self._embedder is not None, "the ingress has refused it"
        with _as_api_errors():
            async with asyncio.timeout(self._timeout_s):
                found: Embedded = await self._embedder.embed.remote(texts)
                return found

    async def each(self, method: str, *args: Any) -> list[Any]:
        """A replica that ended meanwhile is left out: the one in its place reads every alias anew. Else the first error
        is raised."""
        with _as_api_errors():
            async with asyncio.timeout(self._timeout_s):
                found = await self._control.broadcast(method, *args).results_async(return_exceptions=True)
            lost = [result for result in found if isinstance(result, RayActorError)]
            failed = [result for result in found if isinstance(result, BaseException) and result not in lost]
            if failed or len(lost) == len(found):
                raise (failed or lost)[0]
            return [result for result in found if result not in lost]


def _adapter(arm: Dump) -> str:
    """What the router looks at: see AdapterRouter."""
    return arm["adapter"] or ""


@contextlib.contextmanager
def _as_api_errors() -> Iterator[None]:
    try:
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
