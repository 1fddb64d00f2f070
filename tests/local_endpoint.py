"""The whole endpoint in this process, over real HTTP: ingress, engine replica, embedder. Only Ray Serve is left out."""

import asyncio
import hashlib
import pickle
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import httpx
import uvicorn

from graftwork.retrieval.embedder import Embedded
from graftwork.serving.api.app import make_app
from graftwork.serving.api.auth import Keys
from graftwork.serving.api.http_protocol import BoundedHttpProtocol
from graftwork.serving.deploy import EmbedderReplica
from graftwork.serving.live_config import LiveConfig
from graftwork.serving.messages import ArmAnswer, ArmRequest, StreamChunk
from graftwork.serving.replica import EngineReplica
from graftwork.serving.spec import ServeSpec
from tests.ports import free_port

MessageT = TypeVar("MessageT")


class LocalBackend:
    """A `EngineBackend` that calls its one replica directly, where the endpoint goes through Ray."""

    def __init__(self, replica: EngineReplica, embedder: EmbedderReplica | None = None) -> None:
        self.replica, self._embedder = replica, embedder

    async def choices(self, request: ArmRequest) -> list[ArmAnswer]:
        return await self.replica.choices(pickled(request))

    async def stream(self, request: ArmRequest) -> AsyncGenerator[StreamChunk]:
        async with aclosing(self.replica.stream(pickled(request))) as chunks:
            async for chunk in chunks:
                yield pickled(chunk)

    async def embed(self, texts: list[str]) -> Embedded:
        assert self._embedder is not None
        return await self._embedder.embed(texts)

    async def call(self, method: str, *args: Any) -> Any:
        return await getattr(self.replica, method)(*args)

    async def each(self, method: str, *args: Any) -> list[Any]:
        return [await getattr(self.replica, method)(*args)]


def pickled(message: MessageT) -> MessageT:
    """The message after its way from process to process."""
    copy: MessageT = pickle.loads(pickle.dumps(message))
    return copy


async def local_backend(spec: ServeSpec) -> LocalBackend:
    """As Ray Serve makes the replicas. End it with `backend.replica.stop()`."""
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(spec.model_dump(mode="json"))  # type: ignore[misc]
    if spec.embedder is None:
        return LocalBackend(replica)
    embedder = EmbedderReplica.__new__(EmbedderReplica)
    await embedder.__init__(spec.embedder.model_dump(mode="json"))  # type: ignore[misc]
    return LocalBackend(replica, embedder)


@asynccontextmanager
async def local_client(spec: ServeSpec, keys: Keys | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app itself, on the caller's own loop, without a socket."""
    backend = await local_backend(spec)
    transport = httpx.ASGITransport(
        make_app(LiveConfig(spec, backend), backend, keys or Keys()), raise_app_exceptions=False
    )
    try:
        async with (
            asyncio.timeout(60),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
        ):
            yield client
    finally:
        await asyncio.to_thread(backend.replica.stop)


@contextmanager
def local_endpoint(spec: ServeSpec, token: str | None = None) -> Iterator[str]:
    """The endpoint's URL, for the time of the block."""
    port, started, failed = free_port(), threading.Event(), list[BaseException]()
    server: uvicorn.Server | None = None

    async def main() -> None:
        nonlocal server
        backend = await local_backend(spec)
        keys = Keys({"someone": hashlib.sha256(token.encode()).hexdigest()}) if token else Keys()
        app = make_app(LiveConfig(spec, backend), backend, keys)
        server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", http=BoundedHttpProtocol)
        )
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        started.set()
        await serving
        await asyncio.to_thread(backend.replica.stop)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
            started.set()

    thread = threading.Thread(target=run, name="endpoint", daemon=True)
    thread.start()
    assert started.wait(120), "the endpoint did not start"
    if failed:
        raise failed[0]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        assert server is not None
        server.should_exit = True
        thread.join(30)
