"""Live traffic to the base and every adapter, while a new version of one of them is published and swapped in."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from graftwork.datasets.rows import read_rows
from graftwork.demo_spec import BurstSpec
from graftwork.prompts.render import Message
from graftwork.report.schema import AdapterLatency, ServingRecord, SwapRecord
from graftwork.serving.api.status import replica_stats
from graftwork.serving.client import ChatCall
from graftwork.serving.deploy import Endpoint
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.load_test import SwapReport, swap_under_load
from graftwork.storage.store import Store
from graftwork.training.report import TrainReport
from graftwork.training.run import train
from graftwork.training.spec import TrainSpec

STAGING = "next"
"""The update is trained under the alias `next`, which no traffic asks for; the live alias takes it over under load."""


@dataclass(frozen=True)
class TrafficResult:
    """What the endpoint did."""

    record: ServingRecord
    update: TrainReport
    engine: Mapping[str, Any]
    """The replica's counters after the burst."""


def burst_with_update(
    endpoint: Endpoint,
    update: TrainSpec,
    burst: BurstSpec,
    compare: CompareSpec,
    on_progress: Callable[[int, int], None],
) -> TrafficResult:
    """Train the update, then send the burst and publish the update under its live alias when half is answered.

    Needs an initialised Ray. Requests that fail are counted, not raised.
    """
    store = Store(update.root)
    live = f"{update.name}@{update.alias or 'latest'}"
    trained = train(update.with_({"alias": STAGING}), on_progress=lambda p: on_progress(p.step, p.total_steps))
    calls = _calls(endpoint, update, burst, compare)
    swap = asyncio.run(swap_under_load(endpoint, store, live, trained.version, calls, concurrency=burst.concurrency))
    engine: dict[str, Any] = asyncio.run(_stats(endpoint))
    return TrafficResult(_record(swap, engine), trained, engine)


def _calls(endpoint: Endpoint, update: TrainSpec, burst: BurstSpec, compare: CompareSpec) -> list[ChatCall]:
    """The base and the adapters in turn, each with questions of its own task."""
    own = [row.messages[0] for row in read_rows(update.data.train, limit=64, need="train")]
    other = [row.messages[0] for row in read_rows(compare.eval, limit=64, need="eval")]
    models = [endpoint.base, *(f"{endpoint.base}:{ref}" for ref in endpoint.spec.adapters)]
    return [
        ChatCall(model, (_question(model, update.name, own, other, number),), max_tokens=burst.max_new_tokens)
        for number, model in enumerate(islice(cycle(models), burst.requests))
    ]


def _question(model: str, task: str, own: Sequence[Message], other: Sequence[Message], number: int) -> Message:
    asked = own if f":{task}@" in model else other
    return asked[number % len(asked)]


async def _stats(endpoint: Endpoint) -> dict[str, Any]:
    return replica_stats(await endpoint.handle.snapshot.remote())


def _record(swap: SwapReport, engine: Mapping[str, Any]) -> ServingRecord:
    latency = tuple(
        AdapterLatency(name=model, n=total.n, ttft_ms=swap.ttft_ms.get(model), latency_ms=total)
        for model, total in swap.latency_ms.items()
    )
    return ServingRecord(
        latency=latency,
        swap=SwapRecord(
            alias=swap.adapter,
            old_version=swap.old or "none",
            new_version=swap.new,
            requests=swap.requests,
            failed=swap.failed,
            answers_by_version=swap.by_version,
            swap_ms=swap.swap_ms,
        ),
        max_adapters_in_batch=engine["engine"]["most_adapters_in_step"],
    )
