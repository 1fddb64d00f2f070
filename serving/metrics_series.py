"""What requests took, added up per arm and adapter version: plain numbers on one event loop, no locks.

Histograms are cumulative from the start, as Prometheus wants them. How many series there are is bounded: the busiest
adapters have their own, the rest share one called `other`.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
LATENCY_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MAX_SERIES = 50
"""Prometheus keeps about 45 numbers a series here; 50 series a replica are about 2,300."""
_WINDOW = 2048
"""After this many requests every heat is halved, so that yesterday's traffic gives way."""


class SeriesKey(NamedTuple):
    """What a series is about. `adapter` and `version` are empty for the base."""

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
    """The numbers of one key."""

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


class SeriesTable:
    """At most `limit` keys of their own, those with the most recent requests; counts are never lost."""

    def __init__(self, limit: int = MAX_SERIES) -> None:
        self._limit, self._began = limit, 0
        self._own: dict[SeriesKey, RequestSeries] = {}
        self._shared = {OTHER: RequestSeries(), NOT_ADMITTED: RequestSeries()}
        self._heat: Counter[SeriesKey] = Counter()

    def begin(self, key: SeriesKey) -> None:
        """A request for `key`: it may earn the key a series of its own, in place of the one asked for least."""
        self._heat[key] += 1
        self._began += 1
        if self._began % _WINDOW == 0:
            self._heat = Counter({known: heat // 2 for known, heat in self._heat.items() if heat > 1})
        if key in self._own:
            return
        if len(self._own) >= self._limit:
            coldest = min(self._own, key=self._heat.__getitem__)
            if self._heat[key] < 2 * self._heat[coldest] + 2:  # twice as hot, so that two don't take turns
                return
            self._shared[OTHER].add(self._own.pop(coldest))
        self._own[key] = RequestSeries()

    def label(self, key: SeriesKey) -> SeriesKey:
        """The key under which it is counted now."""
        return key if key in self._own or key in self._shared else OTHER

    def at(self, key: SeriesKey) -> RequestSeries:
        """Where to count for `key` now; don't keep it."""
        return self._own.get(key) or self._shared.get(key) or self._shared[OTHER]

    def items(self) -> list[tuple[SeriesKey, RequestSeries]]:
        """Every series; the shared ones only where they have counted something."""
        return [*self._own.items(), *((key, shared) for key, shared in self._shared.items() if shared.outcomes)]
