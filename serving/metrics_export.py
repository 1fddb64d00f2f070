"""Metrics as plain data between replica and ingress, and as Prometheus text for whoever scrapes GET /metrics.

A replica tells its numbers as families; the ingress joins those of all replicas, each line with the replica's name, so
that one scrape sees the endpoint whole. The names carry their units, as Prometheus asks.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from ray.util import metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
Labels = tuple[str, ...]


@dataclass(slots=True)
class Family:
    """One metric: its name without prefix, and a value for each combination of its labels."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: list[tuple[Labels, float | Histogram]] = field(default_factory=list)


KEY_LABELS = ("arm", "adapter", "version")


def traffic_families(items: Sequence[tuple[SeriesKey, RequestSeries]]) -> list[Family]:
    """What requests took, per arm and adapter version."""

    def of(kind: Literal["counter", "histogram"], name: str, text: str, attribute: str) -> Family:
        return Family(kind, name, text, KEY_LABELS, [(tuple(key), getattr(s, attribute)) for key, s in items])

    outcomes: list[tuple[Labels, float | Histogram]] = [
        ((*key, outcome), count) for key, series in items for outcome, count in series.outcomes.items()
    ]
    return [
        Family(
            "counter",
            "requests",
            "Requests ended, by outcome: OpenAI's finish reason, cancelled, or the error's code.",
            (*KEY_LABELS, "outcome"),
            outcomes,
        ),
        of(
            "histogram",
            "ttft_seconds",
            "From arrival at the replica to the first token, adapter load included.",
            "ttft",
        ),
        of(
            "histogram",
            "inter_token_seconds",
            "Between two tokens of one answer; tokens that arrive together share the time since the last ones.",
            "token_gap",
        ),
        of(
            "histogram",
            "time_per_output_token_seconds",
            "Mean time between an answer's tokens; one a request.",
            "token_mean",
        ),
        of("histogram", "latency_seconds", "From arrival at the replica to the end of the answer.", "latency"),
        of("counter", "prompt_tokens", "Prompt tokens of answered requests.", "prompt_tokens"),
        of("counter", "prompt_tokens_cached", "Prompt tokens whose KV came from the prefix cache.", "cached_tokens"),
        of("counter", "passages_left_out", "Retrieved passages that had no room in the prompt.", "passages_left_out"),
        of("counter", "completion_tokens", "Tokens generated.", "completion_tokens"),
    ]


def engine_families(stats: EngineStats) -> list[Family]:
    """The engine's state now and its work since the start."""
    gauges = {
        "requests_running": ("Requests that are decoded or prefilled now.", stats.running),
        "requests_waiting": ("Requests queued in the engine.", stats.waiting),
        "kv_tokens_used": ("Tokens of key-value memory in use.", stats.kv_tokens_used),
        "kv_tokens_limit": ("Tokens of key-value memory.", stats.kv_tokens_limit),
        "prefix_cache_tokens": ("Tokens held by the prefix cache.", stats.prefix_tokens_cached),
    }
    counters = {
        "preemptions": ("Requests put back into the queue for want of KV memory.", stats.preemptions),
        "engine_generated_tokens": ("Tokens the engine has generated.", stats.generated_tokens),
        "engine_prompt_tokens": ("Prompt tokens of all requests that got a token.", stats.prompt_tokens),
        "prefix_cache_hit_tokens": ("Those of them that the prefix cache had.", stats.prompt_tokens_from_cache),
    }
    found = [Family("gauge", name, text, (), [((), value)]) for name, (text, value) in gauges.items()]
    return found + [Family("counter", name, text, (), [((), value)]) for name, (text, value) in counters.items()]


def render(replicas: Mapping[str, Sequence[Family]], own: Sequence[Family] = ()) -> bytes:
    """Prometheus text of all replicas' families (labelled with the replica's name) and of the ingress' own."""
    joined: dict[str, Family] = {}
    for replica, families in replicas.items():
        for one in families:
            whole = joined.setdefault(one.name, Family(one.kind, one.name, one.help, (*one.labels, "replica")))
            whole.values += [((*labels, replica), value) for labels, value in one.values]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected([*joined.values(), *own]))
    return generate_latest(registry)


class _Collected(Collector):
    """What prometheus-client asks for families at each scrape."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return (_metric(one) for one in self._families)


def _metric(one: Family) -> Metric:
    name, labels = PREFIX + one.name, list(one.labels)
    if one.kind == "histogram":
        whole = HistogramMetricFamily(name, one.help, labels=labels)
        for values, found in one.values:
            assert isinstance(found, Histogram), f"{one.name} is a histogram"
            bounds = [*(f"{bound:g}" for bound in found.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(found.counts), strict=True))
            whole.add_metric(list(values), buckets=buckets, sum_value=found.sum_s)
        return whole
    plain = (CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily)(name, one.help, labels=labels)
    for values, found in one.values:
        assert not isinstance(found, Histogram), f"{one.name} is a number"
        plain.add_metric(list(values), found)
    return plain


# HTTP requests by route and status, counted where they leave: what never reached an engine is in here too.


_ELSEWHERE = "unmatched"
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
"""Routes and methods that do not exist share one label each: callers must not invent series."""


class CountedHttp:
    """ASGI middleware. A stream counts when its head is sent; it adds one dictionary write to a request."""

    def __init__(self, app: ASGIApp, counts: Counter[tuple[str, str, str]]) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts[_route(scope), _method(scope), str(message["status"])] += 1
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


def http_families(counts: Counter[tuple[str, str, str]]) -> list[Family]:
    """The counter as a family."""
    values: list[Any] = [(labels, count) for labels, count in sorted(counts.items())]
    text = "HTTP responses begun, by route, method and status."
    return [Family("counter", "http_responses", text, ("route", "method", "status"), values)]


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", _ELSEWHERE)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


# The same numbers through Ray's own metrics, for clusters whose Prometheus scrapes Ray's nodes.
#
# Ray takes one observation a call, under a lock, so nothing is told token by token: requests that have ended and the
# engine's state go over once a second. Tags are those of GET /metrics; Ray adds its own for application and replica.


PERIOD_S = 1.0


class RayExport:
    """Ray's metric objects of one replica."""

    def __init__(self) -> None:
        def seconds(name: str, text: str, bounds: Sequence[float]) -> metrics.Histogram:
            return metrics.Histogram(PREFIX + name, description=text, boundaries=list(bounds), tag_keys=KEY_LABELS)

        self._ttft = seconds("ttft_seconds", "From arrival at the replica to the first token.", TTFT_S)
        self._mean = seconds("time_per_output_token_seconds", "Mean time between an answer's tokens.", TOKEN_S)
        self._latency = seconds("latency_seconds", "From arrival at the replica to the end of the answer.", LATENCY_S)
        self._requests = metrics.Counter(PREFIX + "requests", "Requests ended.", (*KEY_LABELS, "outcome"))
        self._prompt = metrics.Counter(PREFIX + "prompt_tokens", "Prompt tokens of answered requests.", KEY_LABELS)
        self._completion = metrics.Counter(PREFIX + "completion_tokens", "Tokens generated.", KEY_LABELS)
        self._others: dict[str, metrics.Gauge | metrics.Counter] = {}
        self._told: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)

    def export_finished(self, requests: Iterable[FinishedRequest]) -> None:
        """Tell requests that have ended."""
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

    def state(self, families: Iterable[Family]) -> None:
        """Tell gauges as they are and counters by what they grew; histograms have no way over."""
        for one in families:
            for labels, value in one.values:
                if one.kind == "histogram":
                    continue
                assert isinstance(value, int | float), f"{one.name} is a number"
                tags = dict(zip(one.labels, labels, strict=True))
                if one.kind == "gauge":
                    self._metric(one, metrics.Gauge).set(value, tags)
                elif (grown := value - self._told[one.name, labels]) > 0:
                    self._metric(one, metrics.Counter).inc(grown, tags)
                    self._told[one.name, labels] += grown

    def _metric(
        self, one: Family, kind: type[metrics.Gauge] | type[metrics.Counter]
    ) -> metrics.Gauge | metrics.Counter:
        if one.name not in self._others:
            self._others[one.name] = kind(PREFIX + one.name, description=one.help, tag_keys=one.labels)
        return self._others[one.name]


async def keep_telling(traffic: TrafficMetrics, state: Callable[[], Iterable[Family]]) -> None:
    """Tell Ray once a second, for ever."""
    export = RayExport()
    while True:
        await asyncio.sleep(PERIOD_S)
        ended = [traffic.ended.popleft() for _ in range(len(traffic.ended))]
        export.export_finished(ended)
        export.state(state())


# All metrics of one engine replica: its requests, its engine, its adapters, its process.


SWAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


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
        held.values += [
            ((tier,), sum(row.get("size_bytes", 0) for row in tiered))
            for tier, tiered in (("host", rows), ("slot", slots))
        ]
        return [states, held]

    def _memory(self) -> Family:
        rss = self._process.memory_info().rss
        return Family("gauge", "process_resident_bytes", "Resident memory of the replica's process.", (), [((), rss)])
