"""Alerts and dashboards: promtool runs the rules over series, and every metric in them is one that somebody exports."""

import functools
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from graftwork.cluster.jobs.exporter import JobMetrics
from graftwork.cluster.jobs.store import HEARTBEAT_S, SILENT_S, AttemptEnd, Heartbeat, JobStore
from graftwork.serving.ab_test.service import experiment_families
from graftwork.serving.engine.request import EngineStats
from graftwork.serving.metrics_export import ReplicaMetrics, http_families, state_families, traffic_families
from graftwork.storage.store import json_bytes
from tests.jobs import command_job
from tests.process_races import ROOT

MONITORING = ROOT / "k8s/overlays/monitoring"
KUBERAY = {  # ray-operator/controllers/ray/metrics of KubeRay 1.7.0
    "kuberay_job_deployment_status",
    "kuberay_job_execution_duration_seconds",
    "kuberay_cluster_info",
}
RAY = {  # dashboard/modules/reporter/reporter_agent.py and the dashboards of Ray 2.60
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_cpu_utilization",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "ray_memory_manager_worker_eviction_total",
}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")


@functools.cache
def groups() -> dict[str, Any]:
    rule: dict[str, Any] = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))
    groups: dict[str, Any] = rule["spec"]
    return groups


def promtool(folder: Path, *argv: str) -> None:
    done = subprocess.run(["promtool", *argv], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


JOB = {"job": "cards-0123456789", "kind": "train", "on": "k8s:prod/team"}
LABELS = ",".join(f'{key}="{value}"' for key, value in JOB.items())
CASES: list[tuple[str, dict[str, str], str, str, dict[str, str]]] = [
    # alert, series that raise it, when, when it is not yet raised, its labels
    ("GraftworkJobPending", {f"graftwork_job_waiting_seconds{{{LABELS}}}": "0+60x30"}, "18m", "15m", JOB),
    (
        "GraftworkRayJobStuck",
        {'kuberay_job_deployment_status{name="a",namespace="n",uid="u",deployment_status="Initializing"}': "1x30"},
        "16m",
        "14m",
        {"name": "a", "namespace": "n", "uid": "u", "deployment_status": "Initializing"},
    ),
    ("GraftworkJobLost", {f"graftwork_job_silent_seconds{{{LABELS}}}": "3x5 30+60x10"}, "9m", "6m", JOB),
    (
        "GraftworkRetryBurn",
        {f"graftwork_job_attempts{{{LABELS}}}": "2x5 3x10", f'graftwork_job_state{{{LABELS},state="running"}}': "1x15"},
        "8m",
        "5m",
        JOB,
    ),
    ("GraftworkStoreUnreadable", {"graftwork_jobs_up": "1x2 0x20"}, "9m", "6m", {}),
    (
        "GraftworkHeadNearOutOfMemory",
        {
            'ray_node_mem_used{IsHeadNode="true",ray_io_cluster="c"}': "8x3 15x10",
            'ray_node_mem_total{IsHeadNode="true",ray_io_cluster="c"}': "16x13",
        },
        "7m",
        "5m",
        {"IsHeadNode": "true", "ray_io_cluster": "c"},
    ),
    (
        "GraftworkOutOfMemoryKills",
        {'ray_memory_manager_worker_eviction_total{ray_io_cluster="c"}': "0x5 1x10"},
        "7m",
        "5m",
        {"ray_io_cluster": "c"},
    ),
    (
        "GraftworkSlowFirstToken",
        {
            'ray_graftwork_ttft_seconds_bucket{ray_io_cluster="c",arm="a",le="2"}': "0x20",
            'ray_graftwork_ttft_seconds_bucket{ray_io_cluster="c",arm="a",le="4"}': "0+60x20",
            'ray_graftwork_ttft_seconds_bucket{ray_io_cluster="c",arm="a",le="+Inf"}': "0+60x20",
        },
        "12m",
        "4m",
        {"ray_io_cluster": "c", "arm": "a"},
    ),
    (
        "GraftworkAdapterLoadFailures",
        {'ray_graftwork_requests_total{ray_io_cluster="c",adapter="t@v",outcome="adapter_not_servable"}': "0x5 0+3x10"},
        "9m",
        "5m",
        {"ray_io_cluster": "c", "adapter": "t@v", "outcome": "adapter_not_servable"},
    ),
    (
        "GraftworkErrors",
        {
            'graftwork_http_responses_total{ray_io_cluster="c",status="500"}': "0+6x20",
            'graftwork_http_responses_total{ray_io_cluster="c",status="200"}': "0+60x20",
        },
        "12m",
        "4m",
        {"ray_io_cluster": "c"},
    ),
    (
        "GraftworkSplitDrift",
        {'graftwork_experiment_split_evidence{experiment="e",ray_io_cluster="c"}': "1x5 5000x9"},
        "8m",
        "5m",
        {"experiment": "e", "ray_io_cluster": "c"},
    ),
]


@needs_promtool
def test_every_alert_is_raised_in_time_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(groups()))
    tests = []
    for name, series, raised_at, silent_at, labels in CASES:
        rule = next(r for g in groups()["groups"] for r in g["rules"] if r.get("alert") == name)
        fires = {"exp_labels": {**labels, **rule["labels"]}}
        tests.append(
            {
                "name": name,
                "interval": "1m",
                "input_series": [{"series": key, "values": values} for key, values in series.items()],
                "alert_rule_test": [{"eval_time": silent_at, "alertname": name, "exp_alerts": []}],
            }
        )
        tests.append(
            {**tests[-1], "alert_rule_test": [{"eval_time": raised_at, "alertname": name, "exp_alerts": [fires]}]}
        )
    assert {case[0] for case in CASES} == {r["alert"] for g in groups()["groups"] for r in g["rules"] if "alert" in r}
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules_plain.yml"], "evaluation_interval": "30s", "tests": tests})
    )
    plain = {
        "groups": [
            {**g, "rules": [{k: v for k, v in r.items() if k != "annotations"} for r in g["rules"]]}
            for g in groups()["groups"]
        ]
    }
    (tmp_path / "rules_plain.yml").write_text(yaml.safe_dump(plain))  # promtool compares annotations word by word
    promtool(tmp_path, "check", "rules", "rules.yml")
    promtool(tmp_path, "test", "rules", "tests.yml")


@needs_promtool
def test_every_query_of_the_dashboards_is_promql(tmp_path: Path) -> None:
    rules = [{"record": f"q{i}", "expr": expr} for i, expr in enumerate(dashboard_queries())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool(tmp_path, "check", "rules", "queries.yml")
    assert len(rules) >= 25


def dashboard_queries() -> list[str]:
    boards = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((MONITORING / "dashboards").glob("*.json"))
    ]
    assert len(boards) == 3
    return [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]


def test_every_metric_is_one_that_somebody_exports(tmp_path: Path) -> None:
    exprs = dashboard_queries() + [r["expr"] for g in groups()["groups"] for r in g["rules"]]
    recorded = {r["record"] for g in groups()["groups"] for r in g["rules"] if "record" in r}
    used = {name for expr in exprs for name in re.findall(r"\b(?:ray_|graftwork|kuberay_)[a-z0-9_:]*", expr)}
    used -= {"ray_io_cluster"} | recorded
    exported = KUBERAY | RAY | serving_metrics() | job_metrics(tmp_path)
    assert used
    assert used - exported == set()


def serving_metrics() -> set[str]:
    """As GET /metrics names them, and the same through Ray, which puts `ray_` before them."""
    replica = ReplicaMetrics("r", "d", "cpu", EngineStats, list).snapshot()
    names = {name for family in [*state_families(replica), *traffic_families([])] for name in exposed(family)}
    ingress = {name for family in [*http_families(Counter()), *experiment_families([])] for name in exposed(family)}
    return names | ingress | {f"ray_{name}" for name in names}


def exposed(family: Metric) -> set[str]:
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {f"{family.name}{ending}" for ending in endings[family.type]}


def job_metrics(tmp_path: Path) -> set[str]:
    text = scraped(tmp_path)
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def scraped(root: Path) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(JobMetrics(str(root)))
    return generate_latest(registry).decode()


def test_a_store_is_told_as_it_is(tmp_path: Path) -> None:
    runs, now = JobStore(str(tmp_path)), time.time()
    for name, beat_at, ended in (
        ("waits", None, None),
        ("runs", now - HEARTBEAT_S, None),
        ("silent", now - SILENT_S - 40, None),
        ("done", now - 100, AttemptEnd(now - 90, 0)),
        ("failed", now - 100, AttemptEnd(now - 90, 1)),
        ("cancelled", now - 100, AttemptEnd(now - 90, 1, "user")),
        ("over", now - 100, AttemptEnd(now - 90, 1, "budget")),
    ):
        job = command_job(str(tmp_path), ["true"], name=name)
        runs.record(job, "local")
        runs.open_attempt(job.job_id, 1)
        if beat_at is not None:
            here = ("jobs", job.job_id, "a1")
            runs.store.write_bytes(json_bytes(Heartbeat(beat_at, 1, "h", 1, usd=1.5).__dict__), *here, "heartbeat.json")
        if ended is not None:
            runs.end(job.job_id, 1, ended)
    text = scraped(tmp_path)
    states = dict(
        re.findall(r'graftwork_job_state\{job="([a-z]+)-[0-9a-f]+",kind="exec",on="local",state="(\w+)"', text)
    )
    assert states == {
        "waits": "waiting",
        "runs": "running",
        "silent": "silent",
        "done": "succeeded",
        "failed": "failed",
        "cancelled": "cancelled",
        "over": "stopped",
    }
    assert "graftwork_jobs_up 1.0" in text
    silent = dict(re.findall(r'graftwork_job_silent_seconds\{job="([a-z]+)-\S+ ([0-9.]+)', text))
    assert set(silent) == {"runs", "silent"}
    assert float(silent["silent"]) > SILENT_S
    assert re.search(r'graftwork_job_waiting_seconds\{job="waits-', text)
    assert re.search(r'graftwork_job_cost_usd\{job="runs-\S+ 1.5', text)
