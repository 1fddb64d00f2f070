"""Metrics of an endpoint as prometheus_client families: text for GET /metrics, and the same numbers through Ray.

Each engine replica gives one `ReplicaSnapshot`; GET /metrics, /v1/stats, /v1/live and the page show it. Names carry
their units. Own code accumulates (`graftwork.serving.metrics`); prometheus_client renders.
"""

import asyncio
import os
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from ray.util import metrics

from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.engine.request import STEP_S, EngineStats
from graftwork.serving.metrics import (
    LATENCY_S,
    TOKEN_S,
    TTFT_S,
    FinishedRequest,
    Histogram,
    RequestSeries,
    SeriesKey,
    TrafficMetrics,
)

PREFIX = "graftwork_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
KEY_LABELS = ("arm", "adapter", "version")
LabelsT = TypeVar("LabelsT", bound=tuple[str, ...])


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """State of one engine replica now, and its counts since the start."""

    replica: str
    pid: int
    base_digest: str
    reason: str
    """Reason for the engine's device and memory format."""
    engine: EngineStats
    adapters: Sequence[Json]
    """Each version in the engine or on its way there: `AdapterCache.states`, with its slot once loaded."""
    series: Sequence[tuple[SeriesKey, RequestSeries]]
    first_tokens: Sequence[tuple[SeriesKey, float]]
    """(key, TTFT in s) of the last minute."""
    swaps: Histogram
    rss_bytes: int
    peak_rss_bytes: int


def gauge(name: str, text: str, values: Mapping[LabelsT, float], labels: Sequence[str] = ()) -> Metric:
    """Return a gauge by the values of its labels."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def counter(name: str, text: str, values: Mapping[LabelsT, float], labels: Sequence[str] = ()) -> Metric:
    """Return a counter by the values of its labels; its samples end in `_total`."""
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def histogram(name: str, text: str, values: Mapping[LabelsT, Histogram], labels: Sequence[str] = ()) -> Metric:
    """Return a histogram by the values of its labels."""
    family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    for key, found in values.items():
        bounds = [*(f"{bound:g}" for bound in found.bounds), "+Inf"]
        family.add_metric(key, list(zip(bounds, accumulate(found.counts), strict=True)), found.sum_s)
    return family


REQUEST_TIMES = {
    "ttft_seconds": ("ttft", "From arrival at the replica to the first token, adapter load included."),
    "inter_token_seconds": (
        "token_gap",
        "Between two tokens of one answer; tokens that arrive together share the time since the last ones.",
    ),
    "time_per_output_token_seconds": ("token_mean", "Mean time between an answer's tokens; one a request."),
    "latency_seconds": ("latency", "From arrival at the replica to the end of the answer."),
}
"""Histograms by name: attribute of `RequestSeries`, help."""
REQUEST_COUNTS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of answered requests."),
    "prompt_tokens_cached": ("cached_tokens", "Prompt tokens whose KV came from the prefix cache."),
    "passages_left_out": ("passages_left_out", "Retrieved passages that had no room in the prompt."),
    "completion_tokens": ("completion_tokens", "Tokens generated."),
}
"""Counters by name, likewise."""


def traffic_families(items: Sequence[tuple[SeriesKey, RequestSeries]]) -> list[Metric]:
    """Return the requests' counts and times, per arm and adapter version."""
    outcomes = {(*key, outcome): n for key, one in items for outcome, n in one.outcomes.items()}
    text = "Requests ended, by outcome: OpenAI's finish reason, cancelled, or the error's code."
    found = [counter("requests", text, outcomes, (*KEY_LABELS, "outcome"))]
    for make, table in ((histogram, REQUEST_TIMES), (counter, REQUEST_COUNTS)):
        for name, (attribute, text) in table.items():
            found.append(make(name, text, {key: getattr(one, attribute) for key, one in items}, KEY_LABELS))
    return found


def state_families(found: ReplicaSnapshot) -> list[Metric]:
    """Return the state of engine, adapters and process.

    A version that runs is in host memory and in a slot: it counts in both tiers, with the same bytes.
    """
    stats = found.engine
    gauges = {
        "requests_running": ("Requests that are decoded or prefilled now.", stats.running),
        "requests_waiting": ("Requests queued in the engine.", stats.waiting),
        "kv_tokens_used": ("Tokens of key-value memory in use.", stats.kv_tokens_used),
        "kv_tokens_limit": ("Tokens of key-value memory.", stats.kv_tokens_limit),
        "prefix_cache_tokens": ("Tokens held by the prefix cache.", stats.prefix_tokens_cached),
        "process_resident_bytes": ("Resident memory of the replica's process.", found.rss_bytes),
    }
    counters = {
        "preemptions": ("Requests put back into the queue for want of KV memory.", stats.preemptions),
        "engine_generated_tokens": ("Tokens the engine has generated.", stats.generated_tokens),
        "engine_prompt_tokens": ("Prompt tokens of all requests that got a token.", stats.prompt_tokens),
        "prefix_cache_hit_tokens": ("Those of them that the prefix cache had.", stats.prompt_tokens_from_cache),
    }
    steps = Histogram(STEP_S, stats.step_times, stats.step_s)
    states = Counter(row["state"] for row in found.adapters)
    sizes = {
        ("host",): sum(row.get("size_bytes", 0) for row in found.adapters),
        ("slot",): sum(row.get("size_bytes", 0) for row in found.adapters if row.get("in_slot")),
    }
    return [
        *(gauge(name, text, {(): value}) for name, (text, value) in gauges.items()),
        *(counter(name, text, {(): value}) for name, (text, value) in counters.items()),
        histogram("engine_step_seconds", "One forward pass with sampling and events.", {(): steps}),
        histogram("adapter_swap_seconds", "From a refresh to new requests on the new version.", {(): found.swaps}),
        gauge(
            "adapter_versions",
            "Adapter versions in the replica, by state.",
            {(state,): n for state, n in sorted(states.items())},
            ("state",),
        ),
        gauge("adapter_bytes", "Bytes of the adapters in each tier.", sizes, ("tier",)),
    ]


def render(replicas: Sequence[ReplicaSnapshot], own: Sequence[Metric] = ()) -> bytes:
    """Return Prometheus text of all replicas, each sample with the replica's name, and of the ingress' own families."""
    joined: dict[str, Metric] = {}
    for replica in replicas:
        for one in (*traffic_families(replica.series), *state_families(replica)):
            whole = joined.setdefault(one.name, Metric(one.name, one.documentation, one.type))
            for sample in one.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": replica.replica}, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected([*joined.values(), *own]))
    return generate_latest(registry)


class _Collected(Collector):
    """Collector that returns given families."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def http_families(counts: Counter[tuple[str, str, str]]) -> list[Metric]:
    """Return the counts of `CountedHttp` as a family."""
    text = "HTTP responses begun, by route, method and status."
    return [counter("http_responses", text, dict(sorted(counts.items())), ("route", "method", "status"))]


PERIOD_S = 1.0


class RayExport:
    """Ray's metric objects of one replica, for clusters whose Prometheus scrapes Ray's nodes.

    Ray takes one observation a call, under a lock, so nothing is exported token by token: requests that have ended and
    the engine's state go over once a second. Tags are those of GET /metrics; Ray adds its own for application and
    replica.
    """

    def __init__(self) -> None:
        def seconds(name: str, text: str, bounds: Sequence[float]) -> metrics.Histogram:
            return metrics.Histogram(PREFIX + name, description=text, boundaries=list(bounds), tag_keys=KEY_LABELS)

        self._ttft = seconds("ttft_seconds", REQUEST_TIMES["ttft_seconds"][1], TTFT_S)
        mean = "time_per_output_token_seconds"
        self._mean = seconds(mean, REQUEST_TIMES[mean][1], TOKEN_S)
        self._latency = seconds("latency_seconds", REQUEST_TIMES["latency_seconds"][1], LATENCY_S)
        self._requests = metrics.Counter(PREFIX + "requests", "Requests ended.", (*KEY_LABELS, "outcome"))
        self._prompt = metrics.Counter(PREFIX + "prompt_tokens", "Prompt tokens of answered requests.", KEY_LABELS)
        self._completion = metrics.Counter(PREFIX + "completion_tokens", "Tokens generated.", KEY_LABELS)
        self._state_metrics: dict[str, metrics.Gauge | metrics.Counter] = {}
        self._counter_values: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)

    def export_finished(self, requests: Iterable[FinishedRequest]) -> None:
        """Export requests that have ended."""
        for one in requests:
            tags = dict(zip(KEY_LABELS, one.key, strict=True))
            self._requests.inc(1, {**tags, "outcome": one.outcome})
            self._latency.observe(one.latency_s, tags)
            for metric, value in ((self._ttft, one.ttft_s), (self._mean, one.token_mean_s)):
                if value is not None:
                    metric.observe(value, tags)
            for counter, count in ((self._prompt, one.prompt_tokens), (self._completion, one.completion_tokens)):
                if count:
                    counter.inc(count, tags)

    def export_state(self, families: Iterable[Metric]) -> None:
        """Export gauges as they are and counters by their growth; Ray's histograms take single observations alone."""
        for one in families:
            for sample in one.samples:
                labels = tuple(sample.labels)
                if one.type == "gauge":
                    self._metric(one, metrics.Gauge, labels).set(sample.value, dict(sample.labels))
                elif one.type == "counter":
                    key = one.name, tuple(sample.labels.values())
                    if (grown := sample.value - self._counter_values[key]) > 0:
                        self._metric(one, metrics.Counter, labels).inc(grown, dict(sample.labels))
                        self._counter_values[key] += grown

    def _metric(
        self, one: Metric, kind: type[metrics.Gauge] | type[metrics.Counter], labels: tuple[str, ...]
    ) -> metrics.Gauge | metrics.Counter:
        if one.name not in self._state_metrics:
            self._state_metrics[one.name] = kind(one.name, description=one.documentation, tag_keys=labels)
        return self._state_metrics[one.name]


SWAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ReplicaMetrics:
    """Metrics of one engine replica: its requests, engine, adapters and process.

    stats: the engine's. adapters: lines of `EngineReplica.adapters`, with `state` and, once loaded, `size_bytes`.
    """

    def __init__(
        self,
        replica: str,
        base_digest: str,
        reason: str,
        stats: Callable[[], EngineStats],
        adapters: Callable[[], Sequence[Json]],
    ) -> None:
        self._replica, self._base_digest, self._reason = replica, base_digest, reason
        self._stats, self._adapters = stats, adapters
        self._swaps = Histogram(SWAP_S)
        self._process = psutil.Process()
        self.traffic = TrafficMetrics()
        self._export_task: asyncio.Task[None] | None = None

    def start_ray_export(self) -> None:
        """Export to Ray's metrics from now on, once a second."""
        self._export_task = asyncio.create_task(self._export())

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Time a move of an alias; a failed move does not count."""
        began = time.perf_counter()
        yield
        self._swaps.observe(time.perf_counter() - began)

    def snapshot(self) -> ReplicaSnapshot:
        """Return everything as it is now."""
        return ReplicaSnapshot(
            replica=self._replica,
            pid=os.getpid(),
            base_digest=self._base_digest,
            reason=self._reason,
            engine=self._stats(),
            adapters=self._adapters(),
            series=self.traffic.table.counted(),
            first_tokens=self.traffic.first_tokens(),
            swaps=self._swaps,
            rss_bytes=self._process.memory_info().rss,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    async def _export(self) -> None:
        export = RayExport()
        while True:
            await asyncio.sleep(PERIOD_S)
            export.export_finished([self.traffic.ended.popleft() for _ in range(len(self.traffic.ended))])
            export.export_state(state_families(self.snapshot()))
