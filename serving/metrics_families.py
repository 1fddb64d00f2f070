"""Metrics as plain data between replica and ingress, and as Prometheus text for whoever scrapes GET /metrics.

A replica tells its numbers as families; the ingress joins those of all replicas, each line with the replica's name, so
that one scrape sees the endpoint whole. The names carry their units, as Prometheus asks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from graftwork.serving.engine.types import EngineStats
from graftwork.serving.metrics_series import Histogram, RequestSeries, SeriesKey

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
        Family("counter", "requests", "Requests ended, by outcome: OpenAI's finish reason, cancelled, or the error's "
               "code.", (*KEY_LABELS, "outcome"), outcomes),
        of("histogram", "ttft_seconds", "From arrival at the replica to the first token, adapter load included.",
           "ttft"),
        of("histogram", "inter_token_seconds", "Between two tokens of one answer; tokens that arrive together share "
           "the time since the last ones.", "token_gap"),
        of("histogram", "time_per_output_token_seconds", "Mean time between an answer's tokens; one a request.",
           "token_mean"),
        of("histogram", "latency_seconds", "From arrival at the replica to the end of the answer.", "latency"),
        of("counter", "prompt_tokens", "Prompt tokens of answered requests.", "prompt_tokens"),
        of("counter", "prompt_tokens_cached", "Prompt tokens whose KV came from the prefix cache.", "cached_tokens"),
        of("counter", "passages_left_out", "Retrieved passages that had no room in the prompt.", "passages_left_out"),
        of("counter", "completion_tokens", "Tokens generated.", "completion_tokens"),
    ]  # fmt: skip


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
