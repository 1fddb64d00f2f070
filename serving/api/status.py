"""What an endpoint does now, in one document: for the page at GET / and for GET /v1/stats."""

import base64
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse

from graftwork.metrics import quantile
from graftwork.serving.api.openai_responses import Json
from graftwork.serving.metrics import SeriesKey

_LARGEST = {"most_adapters_in_step"}


def total(engines: Sequence[Mapping[str, Any]]) -> Json:
    """The counters of several engines as those of one: added up, `most_adapters_in_step` the largest."""
    first, *rest = engines
    whole = dict(first)
    for engine in rest:
        whole = {name: _joined(name, whole[name], value) for name, value in engine.items()}
    return whole


def snapshot(replicas: Sequence[Mapping[str, Any]], clock_s: float) -> Json:
    """Replicas, their adapters, and the traffic of each arm and version. Counts are from the start; the page takes
    differences. TTFT is over the last minute.

    replicas: what `EngineReplica.live` told. clock_s: any steady clock, so that differences have their time.
    """
    counts: defaultdict[SeriesKey, Counter[str]] = defaultdict(Counter)
    first_ms: defaultdict[SeriesKey, list[float]] = defaultdict(list)
    for replica in replicas:
        for *key, requests, tokens in replica["series"]:
            counts[SeriesKey(*key)].update(requests=requests, tokens=tokens)
        for *key, ttft_ms in replica["first_tokens_ms"]:
            first_ms[SeriesKey(*key)].append(ttft_ms)
    shown = [
        {key: r[key] for key in ("replica", "engine", "peak_rss_bytes", "base_digest", "reason")} for r in replicas
    ]
    traffic = [{**key._asdict(), **counts[key], **_quantiles(first_ms[key])} for key in sorted(counts)]
    adapters = [adapter for replica in replicas for adapter in replica["adapters"]]
    engine = total([replica["engine"] for replica in replicas])
    return {"clock_s": clock_s, "engine": engine, "replicas": shown, "adapters": adapters, "traffic": traffic}


def _quantiles(values: Sequence[float]) -> Json:
    if not values:
        return {"ttft_p50_ms": None, "ttft_p95_ms": None}
    return {"ttft_p50_ms": quantile(values, 0.5), "ttft_p95_ms": quantile(values, 0.95)}


def _joined(name: str, mine: Any, other: Any) -> Any:
    if name in _LARGEST:
        return max(mine, other)
    if isinstance(mine, Mapping):
        return dict(Counter(mine) + Counter(other))
    if isinstance(mine, Iterable):
        return [a + b for a, b in zip(mine, other, strict=True)]
    return mine + other


# The page at GET /: one file, nothing fetched from elsewhere, its own script and style and nothing else may run.


_FILE = Path(__file__).parent / "page" / "index.html"


def page() -> HTMLResponse:
    """The page with its security headers. It holds no data: all of that comes by /v1, with the token."""
    html, headers = _loaded()
    return HTMLResponse(html, headers=headers)


@cache
def _loaded() -> tuple[str, dict[str, str]]:
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
