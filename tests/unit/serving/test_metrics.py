"""Sums of what requests took: right against prometheus-client's own histograms, bounded, and nothing lost."""

import asyncio
import contextlib
import pickle
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference
from prometheus_client.parser import text_string_to_metric_families as parse

from graftwork.serving.api.errors import bad_request
from graftwork.serving.engine.request import EngineStats
from graftwork.serving.metrics import NOT_ADMITTED, OTHER, TTFT_S, Histogram, SeriesKey, SeriesTable, TrafficMetrics
from graftwork.serving.metrics_export import ReplicaMetrics, ReplicaSnapshot, histogram, render


def test_a_histogram_counts_as_prometheus_own() -> None:
    registry = CollectorRegistry()
    theirs, ours = Reference("graftwork_x", "", buckets=TTFT_S, registry=registry), Histogram(TTFT_S)
    chance = random.Random(0)
    for value in [*TTFT_S, 0.0, 1e9, *(chance.expovariate(1) for _ in range(200))]:
        times = chance.randint(1, 3)
        ours.observe(value, times)
        for _ in range(times):
            theirs.observe(value)
    text = render([], [histogram("x", "", {(): ours})]).decode()
    found = {s.labels["le"]: s.value for f in parse(text) for s in f.samples if s.name == "graftwork_x_bucket"}
    expected = [s for f in registry.collect() for s in f.samples]
    assert {float(le): count for le, count in found.items()} == {
        float(s.labels["le"]): s.value for s in expected if s.name.endswith("_bucket")
    }
    total = next(s.value for f in parse(text) for s in f.samples if s.name == "graftwork_x_sum")
    assert total == pytest.approx(next(s.value for s in expected if s.name.endswith("_sum")))


def test_the_busiest_keep_their_own_series_and_nothing_is_lost() -> None:
    table, chance = SeriesTable(limit=10), random.Random(0)
    keys = [SeriesKey("adapter", f"task{n}", "v") for n in range(200)]
    weights = [1 / (n + 1) ** 1.2 for n in range(200)]
    for key in chance.choices(keys, weights, k=20_000):
        table.begin(key)
        table[key].outcomes["stop"] += 1
    own = {key for key, _ in table.counted()} - {OTHER}
    assert len(own) == 10
    assert set(keys[:5]) <= own
    assert sum(series.outcomes["stop"] for _, series in table.counted()) == 20_000


def test_yesterdays_adapters_give_way() -> None:
    table = SeriesTable(limit=2)
    for key in [SeriesKey("a", "old1"), SeriesKey("a", "old2")] * 500 + [SeriesKey("a", "new")] * 4000:
        table.begin(key)
        table[key].completion_tokens += 1
        table[key].outcomes["stop"] += 1
    assert SeriesKey("a", "new") in dict(table.counted())
    assert sum(series.completion_tokens for _, series in table.counted()) == 5000


def play(
    traffic: TrafficMetrics,
    end: BaseException,
    arm: str | None = "base",
    task: str | None = None,
    version: str | None = None,
    bursts: Sequence[int] = (),
) -> None:
    """One request that gets these bursts of tokens and ends so."""
    with contextlib.suppress(type(end)), traffic.request() as watch:
        if arm is not None:
            watch.admitted(arm, task, version)
        for tokens in bursts:
            watch.burst(tokens)
        raise end


def test_a_request_is_counted_by_how_it_ended() -> None:
    traffic = TrafficMetrics()
    refusal = bad_request("no such", code="model_not_found")
    play(traffic, refusal, arm=None)
    play(traffic, asyncio.CancelledError(), "adapter", "card", "0123456789abcdef", bursts=[3])
    play(traffic, ZeroDivisionError())
    card = SeriesKey("adapter", "card", "0123456789ab")
    assert [(one.key, one.outcome, one.completion_tokens) for one in traffic.ended] == [
        (NOT_ADMITTED, "model_not_found", 0),
        (card, "cancelled", 3),
        (SeriesKey("base"), "internal_error", 0),
    ]
    assert sum(traffic.table[card].ttft.counts) == 1
    assert [key for key, _ in traffic.first_tokens()] == [card]


def test_tokens_that_arrive_together_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.5, 0.7, 0.9])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now, 1.0))
    traffic = TrafficMetrics()
    play(traffic, asyncio.CancelledError(), bursts=[1, 1, 4])
    series = traffic.table[SeriesKey("base")]
    assert series.token_gap.sum_s == pytest.approx(0.4)
    assert sum(series.token_gap.counts) == 5
    assert series.ttft.sum_s == pytest.approx(0.5)
    assert series.token_mean.sum_s == pytest.approx(0.4 / 5)
    assert series.latency.sum_s == pytest.approx(1.0)


def snapshot(replica: str, table: SeriesTable) -> ReplicaSnapshot:
    """Of a replica with this traffic and an idle engine, after its way from process to process."""
    found = replace(ReplicaMetrics(replica, "d", "r", EngineStats, list).snapshot(), series=table.counted())
    copy: ReplicaSnapshot = pickle.loads(pickle.dumps(found))
    return copy


def test_replicas_are_told_apart_and_label_values_are_escaped() -> None:
    table = SeriesTable()
    odd = SeriesKey('arm"\\\n', "card", "v")
    table.begin(odd)
    table[odd].outcomes["stop"] += 2
    text = render([snapshot("one", table), snapshot("two", table)]).decode()
    samples = [s for f in parse(text) for s in f.samples if s.name == "graftwork_requests_total"]
    assert {(s.labels["replica"], s.labels["arm"], s.labels["outcome"], s.value) for s in samples} == {
        ("one", odd.arm, "stop", 2.0),
        ("two", odd.arm, "stop", 2.0),
    }
    assert text.count("# TYPE graftwork_ttft_seconds histogram") == 1
