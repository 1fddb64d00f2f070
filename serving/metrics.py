"""Requests counted while they are served: per arm and adapter version in a replica, per route in the ingress.

Plain numbers on the replica's event loop, without locks; a burst of tokens that arrived together costs one look at the
clock. Histograms are cumulative from the start. The number of series is bounded: the busiest adapters have their own,
the rest share `other`. prometheus_client's instruments are not used here: they take one observation a call, and a
series can't be added to another without their private attributes.
"""

import asyncio
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftwork.serving.api.errors import ApiError
from graftwork.serving.messages import ArmAnswer

TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
LATENCY_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MAX_SERIES = 50
"""Prometheus keeps about 45 numbers a series here; 50 series a replica are about 2,300."""
_WINDOW = 2048
"""After this many requests every heat is halved, so that yesterday's traffic gives way."""


class SeriesKey(NamedTuple):
    """Labels of a series. `adapter` and `version` are empty for the base."""

    arm: str
    adapter: str = ""
    version: str = ""
    """The first 12 hex digits of the adapter version."""


OTHER = SeriesKey("other", "other", "other")
NOT_ADMITTED = SeriesKey("none", "none", "none")
"""Requests refused before their adapter was known to exist: a caller's invented names must not become labels."""


class Histogram:
    """Counts of seconds by upper bound; the last count is of everything above the last bound."""

    __slots__ = ("bounds", "counts", "sum_s")

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] = (), sum_s: float = 0.0) -> None:
        self.bounds, self.sum_s = tuple(bounds), sum_s
        self.counts = list(counts) or [0] * (len(bounds) + 1)

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count `times` observations of the same value."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.sum_s += seconds * times

    def add(self, other: "Histogram") -> None:
        """Count everything that `other` has counted."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s


@dataclass(slots=True)
class RequestSeries:
    """Numbers of one key, or of several that share `OTHER`."""

    key: SeriesKey
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_S))
    token_gap: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    token_mean: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    passages_left_out: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, other: "RequestSeries") -> None:
        """Take over everything that `other` has counted."""
        for name in ("ttft", "token_gap", "token_mean", "latency"):
            getattr(self, name).add(getattr(other, name))
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "passages_left_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.outcomes += other.outcomes


class SeriesTable(dict[SeriesKey, RequestSeries]):
    """Series by key. At most `limit` keys have their own, those with the most recent requests; the others share OTHER.

    No count is lost. Look a series up for each count: its key may lose it.
    """

    def __init__(self, limit: int = MAX_SERIES) -> None:
        super().__init__()
        self._limit, self._request_count = limit, 0
        self._shared = {key: RequestSeries(key) for key in (OTHER, NOT_ADMITTED)}
        self._heat: Counter[SeriesKey] = Counter()

    def __missing__(self, key: SeriesKey) -> RequestSeries:
        return self._shared.get(key) or self._shared[OTHER]

    def begin(self, key: SeriesKey) -> None:
        """A request for `key`: it may earn the key a series of its own, in place of the one asked for least."""
        self._heat[key] += 1
        self._request_count += 1
        if self._request_count % _WINDOW == 0:
            self._heat = Counter({known: heat // 2 for known, heat in self._heat.items() if heat > 1})
        if key in self:
            return
        if len(self) >= self._limit:
            coldest = min(self, key=self._heat.__getitem__)
            if self._heat[key] < 2 * self._heat[coldest] + 2:  # twice as hot, so that two don't take turns
                return
            self._shared[OTHER].add(self.pop(coldest))
        self[key] = RequestSeries(key)

    def counted(self) -> list[tuple[SeriesKey, RequestSeries]]:
        """Every series; the shared ones only where they have counted something."""
        return [*self.items(), *((key, shared) for key, shared in self._shared.items() if shared.outcomes)]


RECENT = 1024
"""First tokens remembered one by one, for quantiles of the last minute."""
RECENT_S = 60.0


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has ended, for those who keep their own books of it."""

    key: SeriesKey
    outcome: str
    """OpenAI's finish reason; `cancelled` where the caller left; the error's code where it failed."""
    ttft_s: float | None
    latency_s: float
    token_mean_s: float | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class RequestMetrics:
    """One request under way: one answer, or several to one prompt."""

    traffic: "TrafficMetrics"
    began: float
    key: SeriesKey = NOT_ADMITTED
    ttft_s: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    """Arrival of the latest tokens, by answer."""
    tokens: int = 0
    gaps: int = 0
    gaps_s: float = 0.0
    answer: ArmAnswer | None = None
    """The latest whole answer."""

    def admitted(self, arm: str, task: str | None, version: str | None) -> None:
        """Its arm and adapter version are known and exist."""
        self.key = SeriesKey(arm, task or "", (version or "")[:12])
        self.traffic.table.begin(self.key)

    def burst(self, tokens: int, answer: int = 0) -> None:
        """So many tokens of one answer have arrived together; none where the engine ended it without one."""
        if tokens == 0:
            return
        now = time.perf_counter()
        series = self.traffic.table[self.key]
        if self.ttft_s is None:
            self.ttft_s = now - self.began
            series.ttft.observe(self.ttft_s)
            self.traffic.recent.append((now, self.key, self.ttft_s))
        if answer in self.last:
            waited = now - self.last[answer]
            series.token_gap.observe(waited / tokens, tokens)
            self.gaps, self.gaps_s = self.gaps + tokens, self.gaps_s + waited
        else:
            series.token_gap.observe(0.0, tokens - 1)  # what came with the first token kept nobody waiting
            self.gaps += tokens - 1
        series.completion_tokens += tokens
        self.tokens += tokens
        self.last[answer] = now


class TrafficMetrics:
    """Every request of one replica."""

    def __init__(self) -> None:
        self.table = SeriesTable()
        self.recent: deque[tuple[float, SeriesKey, float]] = deque(maxlen=RECENT)
        """(when, key, TTFT in s) of the latest first tokens."""
        self.ended: deque[FinishedRequest] = deque(maxlen=16 * RECENT)
        """Requests that have ended since somebody took them out."""

    @contextmanager
    def request(self) -> Iterator[RequestMetrics]:
        """Watch one request; how the block is left is how it ended."""
        watch, failure = RequestMetrics(self, time.perf_counter()), None
        try:
            yield watch
        except ApiError as error:
            failure = error.code or f"http_{error.status}"
            raise
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException:  # counted, then raised
            failure = "internal_error"
            raise
        finally:
            series, answer = self.table[watch.key], watch.answer
            outcome = failure or (answer.finish_reason if answer else "cancelled")
            latency = time.perf_counter() - watch.began
            mean = watch.gaps_s / watch.gaps if watch.gaps else None
            prompt = answer.prompt_tokens if answer else 0
            series.outcomes[outcome] += 1
            series.latency.observe(latency)
            if mean is not None:
                series.token_mean.observe(mean)
            if answer:
                series.prompt_tokens += prompt
                series.cached_tokens += answer.cached_tokens
                series.passages_left_out += len(answer.left_out_ids)
            self.ended.append(FinishedRequest(series.key, outcome, watch.ttft_s, latency, mean, prompt, watch.tokens))

    def first_tokens(self) -> list[tuple[SeriesKey, float]]:
        """(key, TTFT in s) of the last minute, at most RECENT of them."""
        oldest = time.perf_counter() - RECENT_S
        return [(key, ttft_s) for when, key, ttft_s in self.recent if when >= oldest]


_UNMATCHED = "unmatched"
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
"""Routes and methods that do not exist share one label each: callers must not invent series."""


class CountedHttp:
    """ASGI middleware. A stream counts when its head is sent; it adds one dictionary write to a request."""

    def __init__(self, app: ASGIApp, counts: Counter[tuple[str, str, str]]) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", _UNMATCHED)
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._counts[route, method, str(message["status"])] += 1
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
