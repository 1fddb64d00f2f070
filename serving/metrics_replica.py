"""All metrics of one engine replica: its requests, its engine, its adapters, its process."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from graftwork.serving.engine.types import STEP_S, EngineStats
from graftwork.serving.metrics_families import Family, engine_families, traffic_families
from graftwork.serving.metrics_ray import keep_telling
from graftwork.serving.metrics_series import Histogram
from graftwork.serving.metrics_traffic import TrafficMetrics

SWAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
Dump = dict[str, Any]


class ReplicaMetrics:
    """stats: the engine's. adapters: lines of `EngineReplica.adapters`, with `state` and, once loaded, `size_bytes`."""

    def __init__(self, stats: Callable[[], EngineStats], adapters: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._stats, self._adapters = stats, adapters
        self._swaps = Histogram(SWAP_S)
        self._process = psutil.Process()
        self.traffic = TrafficMetrics()
        self._telling: asyncio.Task[None] | None = None

    def tell_ray(self) -> None:
        """From now on Ray gets the numbers too, once a second."""
        self._telling = asyncio.create_task(keep_telling(self.traffic, self.state))

    @contextmanager
    def swap(self) -> Iterator[None]:
        """An alias moves inside the block; a failed move does not count."""
        began = time.perf_counter()
        yield
        self._swaps.observe(time.perf_counter() - began)

    def families(self) -> list[Family]:
        """Everything, for GET /metrics."""
        return [*traffic_families(self.traffic.table.items()), *self.state()]

    def state(self) -> list[Family]:
        """What no request carries: engine, adapters, process."""
        stats = self._stats()
        steps = Family("histogram", "engine_step_seconds", "One forward pass with sampling and events.")
        steps.values.append(((), Histogram(STEP_S, stats.step_times, stats.step_s)))
        swaps = Family("histogram", "adapter_swap_seconds", "From a refresh to new requests on the new version.")
        swaps.values.append(((), self._swaps))
        return [*engine_families(stats), steps, swaps, *self._adapter_families(), self._memory()]

    def _adapter_families(self) -> list[Family]:
        """A version that runs lies in host memory and in a slot: it counts in both tiers, with the same bytes."""
        rows = self._adapters()
        states = Family("gauge", "adapter_versions", "Adapter versions in the replica, by state.", ("state",))
        states.values += [((state,), count) for state, count in sorted(Counter(r["state"] for r in rows).items())]
        held = Family("gauge", "adapter_bytes", "Bytes of the adapters in each tier.", ("tier",))
        slots = [row for row in rows if row.get("in_slot")]
        held.values += [((tier,), sum(row.get("size_bytes", 0) for row in tiered))
                        for tier, tiered in (("host", rows), ("slot", slots))]  # fmt: skip
        return [states, held]

    def _memory(self) -> Family:
        rss = self._process.memory_info().rss
        return Family("gauge", "process_resident_bytes", "Resident memory of the replica's process.", (), [((), rss)])
