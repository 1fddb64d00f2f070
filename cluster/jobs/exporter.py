"""Prometheus exporter of the jobs in a store, which outlives the metrics of the clusters.

It reads the store alone and no target: age of the heartbeats, attempts, cost.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from graftwork.cluster.jobs.store import SILENT_S, AttemptRecord, JobRecord, JobStore
from graftwork.errors import StorageError

JOB = ("job", "kind", "on")


@dataclass(frozen=True)
class _Row:
    record: JobRecord
    attempts: int
    latest: AttemptRecord

    @property
    def labels(self) -> list[str]:
        return [self.record.job_id, self.record.kind, self.record.on]

    def state(self, now: float) -> str:
        """waiting, running, silent, succeeded, failed, cancelled or stopped."""
        ended, beat = self.latest.ended, self.latest.heartbeat
        if ended is not None:
            if ended.reason is not None:
                return "cancelled" if ended.reason == "user" else "stopped"
            return "succeeded" if ended.exit_code == 0 else "failed"
        if beat is None:
            return "waiting"
        return "running" if now - beat.at <= SILENT_S else "silent"


class JobMetrics(Collector):
    """What each scrape reads from the store. Ended attempts do not change, so each is read once."""

    def __init__(self, root: str) -> None:
        self._runs = JobStore(root)
        self._records: dict[str, JobRecord] = {}
        self._ended: dict[tuple[str, int], AttemptRecord] = {}

    def collect(self) -> Iterator[Metric]:
        """One line a job and metric; `graftwork_jobs_up` is 0 where the store cannot be read."""
        now = time.time()
        up = GaugeMetricFamily("graftwork_jobs_up", "Whether the store of the jobs could be read.")
        try:
            rows = [row for row in map(self._row, self._runs.job_ids()) if row is not None]
        except StorageError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from _families(rows, now)

    def _row(self, job_id: str) -> _Row | None:
        numbers = self._runs.attempts(job_id)
        if not numbers:
            return None
        if job_id not in self._records:
            self._records[job_id] = self._runs.job(job_id)
        key = (job_id, numbers[-1])
        latest = self._ended.get(key) or self._runs.attempt(*key)
        if latest.ended is not None:
            self._ended[key] = latest
        return _Row(self._records[job_id], len(numbers), latest)


def _families(rows: list[_Row], now: float) -> Iterator[Metric]:
    state = GaugeMetricFamily("graftwork_job_state", "1 for the state that a job is in.", labels=[*JOB, "state"])
    tried = GaugeMetricFamily("graftwork_job_attempts", "Attempts at a job so far.", labels=JOB)
    silent = GaugeMetricFamily(
        "graftwork_job_silent_seconds",
        "Since a driver was last heard; of jobs that have started and not ended.",
        labels=JOB,
    )
    waiting = GaugeMetricFamily(
        "graftwork_job_waiting_seconds", "Since a job was submitted; of jobs whose driver has not started.", labels=JOB
    )
    cost = GaugeMetricFamily(
        "graftwork_job_cost_usd", "What a job's latest attempt has cost by its prices.", labels=JOB
    )
    for row in rows:
        now_in, beat = row.state(now), row.latest.heartbeat
        state.add_metric([*row.labels, now_in], 1)
        tried.add_metric(row.labels, row.attempts)
        if now_in == "waiting":
            waiting.add_metric(row.labels, max(now - row.latest.submitted_at, 0))
        if beat is not None and row.latest.ended is None:
            silent.add_metric(row.labels, max(now - beat.at, 0))
        if beat is not None and beat.usd is not None:
            cost.add_metric(row.labels, beat.usd)
    yield from (state, tried, silent, waiting, cost)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A line a scrape helps nobody."""


def export(root: str, host: str, port: int, ready: threading.Event | None = None) -> None:
    """Answer GET /metrics until the process ends. Raises OSError where the port is taken, ConfigError for a root."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(JobMetrics(root))
    with make_server(host, port, make_wsgi_app(registry), handler_class=_Quiet) as server:
        if ready is not None:
            ready.set()
        server.serve_forever()
