"""Counters of a vLLM engine: requests as we saw them end, and what vLLM tells of its scheduler after each step.

vLLM 0.29.0 calls its stat loggers on its event loop, where our own counts are taken too.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from graftwork.serving.engine.types import EngineStats, FinishReason, TokenEvent


@dataclass
class Tally:
    """Counts of one engine. Written on the engine's event loop, read from any thread."""

    kv_tokens_limit: int
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    preemptions: int = 0
    most_adapters: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """vLLM's SchedulerStats and IterationStats of a step; either may be None."""
        if scheduler_stats is not None:
            self.running, self.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            self.most_adapters = max(self.most_adapters, len(scheduler_stats.running_lora_adapters))
        if iteration_stats is not None:
            self.steps += 1
            self.preemptions += iteration_stats.num_preempted_reqs

    def token(self, event: TokenEvent, prompt_tokens: int, *, first: bool) -> None:
        """A token was handed out, or a continuation scored."""
        self.generated += event.token_id >= 0
        if first:
            self.prompt_tokens += prompt_tokens
            self.cached_tokens += event.cached_tokens

    def stats(self, live: int) -> EngineStats:
        """As `Engine.stats`. live: requests that have not ended; vLLM's own view lags by a step."""
        return EngineStats(
            running=min(self.running, live),
            waiting=max(live - min(self.running, live), 0),
            kv_tokens_used=round(self.kv_usage * self.kv_tokens_limit) if live else 0,
            kv_tokens_limit=self.kv_tokens_limit,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_from_cache=self.cached_tokens,
            generated_tokens=self.generated,
            finished={reason: count for reason, count in self.finished.items() if count},
            preemptions=self.preemptions,
            most_adapters_in_step=self.most_adapters,
        )
