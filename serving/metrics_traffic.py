"""One engine replica's requests as they go: when the first token came, the gaps between tokens, how each ended.

All calls are on the replica's event loop. A burst of tokens that arrived together costs one look at the clock.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graftwork.serving.api_error import ApiError
from graftwork.serving.arms import ArmAnswer
from graftwork.serving.metrics_series import NOT_ADMITTED, SeriesKey, SeriesTable

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


class RequestMetrics:
    """One request under way: one answer, or several to one prompt."""

    def __init__(self, traffic: "TrafficMetrics") -> None:
        self._traffic, self._began = traffic, time.perf_counter()
        self._key = NOT_ADMITTED
        self._ttft_s: float | None = None
        self._last: dict[int, float] = {}
        self._tokens, self._gaps, self._gaps_s = 0, 0, 0.0
        self._answer: ArmAnswer | None = None

    def admitted(self, arm: str, task: str | None, version: str | None) -> None:
        """Its arm and adapter version are known and exist."""
        self._key = SeriesKey(arm, task or "", (version or "")[:12])
        self._traffic.table.begin(self._key)

    def burst(self, tokens: int, answer: int = 0) -> None:
        """So many tokens of one answer have arrived together; none where the engine ended it without one."""
        if tokens == 0:
            return
        now = time.perf_counter()
        series = self._traffic.table.at(self._key)
        if self._ttft_s is None:
            self._ttft_s = now - self._began
            series.ttft.observe(self._ttft_s)
            self._traffic.recent.append((now, self._key, self._ttft_s))
        if answer in self._last:
            waited = now - self._last[answer]
            series.token_gap.observe(waited / tokens, tokens)
            self._gaps, self._gaps_s = self._gaps + tokens, self._gaps_s + waited
        else:
            series.token_gap.observe(0.0, tokens - 1)  # what came with the first token kept nobody waiting
            self._gaps += tokens - 1
        series.completion_tokens += tokens
        self._tokens += tokens
        self._last[answer] = now

    def done(self, answer: ArmAnswer) -> None:
        """An answer is whole."""
        self._answer = answer

    def end(self, outcome: str) -> FinishedRequest:
        """Count it."""
        series = self._traffic.table.at(self._key)
        latency = time.perf_counter() - self._began
        mean = self._gaps_s / self._gaps if self._gaps else None
        prompt = self._answer.prompt_tokens if self._answer else 0
        series.outcomes[outcome] += 1
        series.latency.observe(latency)
        series.prompt_tokens += prompt
        series.cached_tokens += self._answer.cached_tokens if self._answer else 0
        series.passages_left_out += len(self._answer.left_out_ids) if self._answer else 0
        if mean is not None:
            series.token_mean.observe(mean)
        label = self._traffic.table.label(self._key)
        return FinishedRequest(label, outcome, self._ttft_s, latency, mean, prompt, self._tokens)

    @property
    def reason(self) -> str:
        """OpenAI's finish reason, of the last answer where there were several."""
        return self._answer.finish_reason if self._answer else "cancelled"


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
        watch = RequestMetrics(self)
        try:
            yield watch
        except ApiError as error:
            self.ended.append(watch.end(error.code or f"http_{error.status}"))
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self.ended.append(watch.end(watch.reason))
            raise
        except BaseException:
            self.ended.append(watch.end("internal_error"))
            raise
        self.ended.append(watch.end(watch.reason))

    def first_tokens(self) -> list[tuple[SeriesKey, float]]:
        """(key, TTFT in s) of the last minute, at most RECENT of them."""
        oldest = time.perf_counter() - RECENT_S
        return [(key, ttft_s) for when, key, ttft_s in self.recent if when >= oldest]
