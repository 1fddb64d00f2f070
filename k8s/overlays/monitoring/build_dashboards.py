"""Grafana's dashboards as code: `python k8s/overlays/monitoring/build_dashboards.py` writes dashboards/*.json.

A panel is a title, a unit and its queries; where it stands follows from the order. A test compares the files.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${source}"}
COLUMNS, WIDTH, HEIGHT = 2, 12, 8


@dataclass(frozen=True)
class Panel:
    """Queries are (PromQL, legend). `kind` is Grafana's."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    text: str = ""


JOBS = (
    Panel("Jobs by state", "short", (("sum by (state) (graftwork_job_state)", "{{state}}"),), "stat"),
    Panel("Spent on latest attempts", "currencyUSD", (("sum by (job) (graftwork_job_cost_usd)", "{{job}}"),)),
    Panel(
        "Drivers: since last heard",
        "s",
        (("graftwork_job_silent_seconds", "{{job}}"),),
        text="A driver beats every 5 s; after 20 s of silence its job counts as lost.",
    ),
    Panel("Waiting for their driver", "s", (("graftwork_job_waiting_seconds", "{{job}} on {{on}}"),)),
    Panel(
        "Attempts",
        "short",
        (("graftwork_job_attempts", "{{job}}"),),
        "bargauge",
        "Each attempt above the first was a lost, failed or cancelled one before it.",
    ),
    Panel(
        "RayJobs by KubeRay's status",
        "short",
        (("sum by (deployment_status) (kuberay_job_deployment_status)", "{{deployment_status}}"),),
    ),
    Panel("Time of RayJobs", "s", (("kuberay_job_execution_duration_seconds", "{{name}} {{job_deployment_status}}"),)),
    Panel("Store readable", "bool_yes_no", (("graftwork_jobs_up", "store"),), "stat"),
)

CLUSTER = (
    Panel(
        "Memory of heads",
        "percentunit",
        (('ray_node_mem_used{IsHeadNode="true"} / ray_node_mem_total{IsHeadNode="true"}', "{{ray_io_cluster}}"),),
    ),
    Panel(
        "Memory of workers",
        "percentunit",
        (
            (
                'ray_node_mem_used{IsHeadNode="false"} / ray_node_mem_total{IsHeadNode="false"}',
                "{{ray_io_cluster}} {{ip}}",
            ),
        ),
    ),
    Panel("GPU use", "percent", (("ray_node_gpus_utilization", "{{ray_io_cluster}} {{ip}} {{GpuIndex}}"),)),
    Panel("GPU memory", "mbytes", (("ray_node_gram_used", "{{ray_io_cluster}} {{ip}} {{GpuIndex}}"),)),
    Panel("CPU use", "percent", (("ray_node_cpu_utilization", "{{ray_io_cluster}} {{ip}}"),)),
    Panel(
        "Workers killed for want of memory, an hour",
        "short",
        (("sum by (ray_io_cluster) (increase(ray_memory_manager_worker_eviction_total[1h]))", "{{ray_io_cluster}}"),),
    ),
    Panel(
        "Network",
        "Bps",
        (
            ("sum by (ray_io_cluster) (ray_node_network_receive_speed)", "{{ray_io_cluster}} in"),
            ("sum by (ray_io_cluster) (ray_node_network_send_speed)", "{{ray_io_cluster}} out"),
        ),
    ),
    Panel(
        "Clusters up", "short", (("sum by (namespace, owner_kind) (kuberay_cluster_info)", "{{owner_kind}}"),), "stat"
    ),
)


def _quantile(share: float, name: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate(ray_graftwork_{name}_bucket[5m])))"


SERVING = (
    Panel(
        "Requests by outcome", "reqps", (("sum by (outcome) (rate(ray_graftwork_requests_total[5m]))", "{{outcome}}"),)
    ),
    Panel("Requests by arm", "reqps", (("sum by (arm) (rate(ray_graftwork_requests_total[5m]))", "{{arm}}"),)),
    Panel(
        "Time to first token",
        "s",
        (
            (_quantile(0.5, "ttft_seconds", "arm"), "{{arm}} median"),
            (_quantile(0.99, "ttft_seconds", "arm"), "{{arm}} p99"),
        ),
    ),
    Panel("Time per output token, p99", "s", ((_quantile(0.99, "time_per_output_token_seconds", "arm"), "{{arm}}"),)),
    Panel(
        "Requests in the engines",
        "short",
        (("sum(ray_graftwork_requests_running)", "running"), ("sum(ray_graftwork_requests_waiting)", "waiting")),
    ),
    Panel(
        "Key-value memory in use",
        "percentunit",
        (("sum(ray_graftwork_kv_tokens_used) / sum(ray_graftwork_kv_tokens_limit)", "of all replicas"),),
    ),
    Panel("Adapters in memory", "bytes", (("sum by (tier) (ray_graftwork_adapter_bytes)", "{{tier}}"),)),
    Panel(
        "Adapters that could not be served",
        "short",
        (
            (
                'sum by (adapter, outcome) (increase(ray_graftwork_requests_total{outcome=~"adapter_not_servable|'
                'storage_unavailable"}[5m]))',
                "{{adapter}} {{outcome}}",
            ),
        ),
    ),
    Panel(
        "Experiments: answers by arm",
        "reqps",
        (("sum by (experiment, arm) (rate(graftwork_experiment_answers_total[5m]))", "{{experiment}} {{arm}}"),),
    ),
    Panel(
        "Experiments: evidence against the split",
        "short",
        (("graftwork_experiment_split_evidence", "{{experiment}}"),),
        text="Over 1000 the arms do not get the traffic they were given, and no verdict may be drawn.",
    ),
    Panel(
        "Responses by status", "reqps", (("sum by (status) (rate(graftwork_http_responses_total[5m]))", "{{status}}"),)
    ),
    Panel(
        "Prefix cache: share of prompt tokens",
        "percentunit",
        (
            (
                "sum(rate(ray_graftwork_prefix_cache_hit_tokens_total[5m])) / "
                "sum(rate(ray_graftwork_engine_prompt_tokens_total[5m]))",
                "hits",
            ),
        ),
    ),
)

DASHBOARDS = {
    "jobs": ("Graftwork: jobs", JOBS),
    "cluster": ("Graftwork: clusters", CLUSTER),
    "serving": ("Graftwork: serving", SERVING),
}


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard as Grafana loads it."""
    title, panels = DASHBOARDS[name]
    variable = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": f"graftwork-{name}",
        "title": title,
        "tags": ["graftwork"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": [_panel(i, panel) for i, panel in enumerate(panels)],
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
        for i, (expr, legend) in enumerate(panel.queries)
    ]
    place = {"x": index % COLUMNS * WIDTH, "y": index // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
    return {
        "id": index + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "gridPos": place,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
    }


def text_of(name: str) -> str:
    """The file's text."""
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(text_of(each), encoding="utf-8")
