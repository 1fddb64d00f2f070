"""The same numbers through Ray's own metrics, for clusters whose Prometheus scrapes Ray's nodes.

Ray takes one observation a call, under a lock, so nothing is told token by token: requests that have ended and the
engine's state go over once a second. Tags are those of GET /metrics; Ray adds its own for application and replica.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from ray.util import metrics

from graftwork.serving.metrics_families import KEY_LABELS, PREFIX, Family
from graftwork.serving.metrics_series import LATENCY_S, TOKEN_S, TTFT_S
from graftwork.serving.metrics_traffic import FinishedRequest, TrafficMetrics

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
