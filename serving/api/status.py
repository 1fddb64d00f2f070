"""State of an endpoint from the snapshots of its replicas: GET /v1/stats, GET /v1/live, and the page at GET /.

The page is one file; nothing is fetched from elsewhere, and only its own script and style may run.
"""

import base64
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse

from graftwork.metrics import quantile
from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.metrics import SeriesKey
from graftwork.serving.metrics_export import ReplicaSnapshot

_LARGEST = {"most_adapters_in_step"}


def replica_stats(replica: ReplicaSnapshot) -> Json:
    """Return the counters of one replica's engine and its process, the base and how it is held."""
    return {
        "replica": replica.replica,
        "pid": replica.pid,
        "peak_rss_bytes": replica.peak_rss_bytes,
        "base_digest": replica.base_digest,
        "reason": replica.reason,
        "engine": asdict(replica.engine),
    }


def stats(replicas: Sequence[ReplicaSnapshot]) -> Json:
    """Return the body of GET /v1/stats: each replica, and their engines' counters as those of one."""
    each = [replica_stats(replica) for replica in replicas]
    return {"replicas": each, "engine": total([one["engine"] for one in each])}


def total(engines: Sequence[Json]) -> Json:
    """Return the counters of several engines as those of one: added up, `most_adapters_in_step` the largest."""
    first, *rest = engines
    whole = dict(first)
    for engine in rest:
        whole = {name: _add_counts(name, whole[name], value) for name, value in engine.items()}
    return whole


def live(replicas: Sequence[ReplicaSnapshot], clock_s: float) -> Json:
    """Return the body of GET /v1/live: replicas, their adapters, and the traffic of each arm and version.

    Counts are from the start; the page takes differences. TTFT is over the last minute. clock_s: any steady clock, so
    that differences have their time.
    """
    counts: defaultdict[SeriesKey, Counter[str]] = defaultdict(Counter)
    first_ms: defaultdict[SeriesKey, list[float]] = defaultdict(list)
    for replica in replicas:
        for key, series in replica.series:
            counts[key].update(requests=sum(series.outcomes.values()), tokens=series.completion_tokens)
        for key, ttft_s in replica.first_tokens:
            first_ms[key].append(ttft_s * 1000)
    each = [replica_stats(replica) for replica in replicas]
    shown = [
        {key: one[key] for key in ("replica", "engine", "peak_rss_bytes", "base_digest", "reason")} for one in each
    ]
    traffic = [
        {
            **key._asdict(),
            **counts[key],
            "ttft_p50_ms": quantile(first_ms[key], 0.5) if first_ms[key] else None,
            "ttft_p95_ms": quantile(first_ms[key], 0.95) if first_ms[key] else None,
        }
        for key in sorted(counts)
    ]
    adapters = [adapter for replica in replicas for adapter in replica.adapters]
    engine = total([one["engine"] for one in each])
    return {"clock_s": clock_s, "engine": engine, "replicas": shown, "adapters": adapters, "traffic": traffic}


def _add_counts(name: str, mine: Any, other: Any) -> Any:
    if name in _LARGEST:
        return max(mine, other)
    if isinstance(mine, Mapping):
        return dict(Counter(mine) + Counter(other))
    if isinstance(mine, Iterable):
        return [a + b for a, b in zip(mine, other, strict=True)]
    return mine + other


_FILE = Path(__file__).parent / "page" / "index.html"


def page() -> HTMLResponse:
    """The page with its security headers. It holds no data: all of that comes by /v1, with the token."""
    html, headers = _load_page()
    return HTMLResponse(html, headers=headers)


@cache
def _load_page() -> tuple[str, dict[str, str]]:
    html = _FILE.read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return html, headers


def _hashes(html: str, tag: str) -> str:
    """The sha256 sources of the inline elements, as a Content-Security-Policy names them."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    assert bodies, f"the page has a <{tag}>"
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
