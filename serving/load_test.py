"""Load test of an endpoint while an adapter is replaced: failures, versions that answered, latency."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from graftwork.artifacts import publish
from graftwork.artifacts.manifest import aliases
from graftwork.errors import GraftworkError
from graftwork.metrics import Distribution, distribution
from graftwork.serving.client import AsyncClient, ChatCall, ClientReply
from graftwork.serving.deploy import Endpoint
from graftwork.storage.store import Store

BASE = "base"


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a burst. Times are seconds since the burst began, at the caller."""

    call: ChatCall
    began_s: float
    ended_s: float
    reply: ClientReply | None
    error: str | None

    @property
    def version(self) -> str:
        """The adapter version that answered, or `base`."""
        return (self.reply.adapter_version or BASE) if self.reply else "failed"


@dataclass(frozen=True, slots=True)
class SwapReport:
    """Result of a burst with a swap in its middle."""

    adapter: str
    """`task@alias` that was moved."""
    old: str | None
    new: str
    requests: int
    failed: int
    errors: tuple[str, ...]
    """The first few, in full."""
    by_version: dict[str, int]
    """Answers by the adapter version that gave them."""
    stale: int
    """Requests for the adapter sent after the swap was confirmed, and yet answered by another version: must be 0."""
    swap_ms: float
    """From the request to swap until every replica gives the new version to new requests; the load included."""
    wall_s: float
    ttft_ms: dict[str, Distribution]
    """By model name; measured at the replica."""
    latency_ms: dict[str, Distribution]
    """By model name; measured at the caller."""


async def burst(
    client: AsyncClient,
    calls: Iterable[ChatCall],
    *,
    concurrency: int,
    on_answer: Callable[[int], None] = lambda _count: None,
    began: float | None = None,
) -> list[Sent]:
    """Send all calls, `concurrency` at a time, every other one as a stream. A failure is recorded, never raised.

    calls: taken one by one as places get free, so a generator decides how long the burst goes on.
    on_answer: called with how many have been answered, each time it grows.
    began: `time.perf_counter()` that times are counted from, where it isn't now.
    """
    began = time.perf_counter() if began is None else began
    queue = iter(enumerate(calls))
    sent: list[Sent] = []

    async def worker() -> None:
        for number, call in queue:
            start = time.perf_counter() - began
            reply = error = None
            try:
                reply = await client.chat(call, stream=number % 2 == 1)
            except GraftworkError as failure:
                error = str(failure)
            sent.append(Sent(call, start, time.perf_counter() - began, reply, error))
            on_answer(len(sent))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return sent


async def swap_under_load(
    endpoint: Endpoint, store: Store, ref: str, new_version: str, calls: Sequence[ChatCall], *, concurrency: int
) -> SwapReport:
    """Move `ref` (`task@alias`) to the published `new_version` when half of `calls` are answered, and go on asking.

    The last calls, two for each of `concurrency`, wait for the swap's end: without them `stale` could not fail.

    Raises ArtifactError for an unknown version, ApiError where the endpoint refuses the new one; requests that fail are
    counted, not raised.
    """
    task, _, alias = ref.partition("@")
    old = aliases(store, task).get(alias)
    during = len(calls) - min(2 * concurrency, len(calls) // 2)
    async with endpoint.async_client() as client:
        began = time.perf_counter()
        at_half = asyncio.Event()

        def count(answered: int) -> None:
            if 2 * answered >= len(calls):
                at_half.set()

        running = asyncio.create_task(burst(client, calls[:during], concurrency=concurrency, on_answer=count))
        await at_half.wait()
        start = time.perf_counter()
        await asyncio.to_thread(publish.promote, store, task, alias, new_version)
        await client.refresh(ref)
        swapped = time.perf_counter()
        sent = await running
        sent += await burst(client, calls[during:], concurrency=concurrency, began=began)
    wall_s = time.perf_counter() - began
    names = {f"{endpoint.base}:{ref}"} | ({f"{endpoint.base}:{task}"} if alias == "latest" else set())
    return _report(ref, old, new_version, sent, names, swapped - began, (swapped - start) * 1000, wall_s)


def _report(
    ref: str,
    old: str | None,
    new: str,
    sent: Sequence[Sent],
    names: set[str],
    swapped_s: float,
    swap_ms: float,
    wall_s: float,
) -> SwapReport:
    late = [one for one in sent if one.call.model in names and one.began_s > swapped_s]
    models = sorted({one.call.model for one in sent})
    answered = {model: [one for one in sent if one.call.model == model and one.reply] for model in models}
    ttft = {m: distribution([one.reply.ttft_ms for one in ones if one.reply], "ms") for m, ones in answered.items()}
    latency = {
        m: distribution([(one.ended_s - one.began_s) * 1000 for one in ones], "ms") for m, ones in answered.items()
    }
    return SwapReport(
        adapter=ref,
        old=old,
        new=new,
        requests=len(sent),
        failed=sum(one.reply is None for one in sent),
        errors=tuple(one.error for one in sent if one.error)[:5],
        by_version=dict(Counter(one.version for one in sent if one.reply)),
        stale=sum(one.version not in (new, "failed") for one in late),
        swap_ms=swap_ms,
        wall_s=wall_s,
        ttft_ms={model: found for model, found in ttft.items() if found},
        latency_ms={model: found for model, found in latency.items() if found},
    )
