"""What the engine has done since its start."""

from bisect import bisect_left
from collections import Counter

from graftwork.serving.engine.kv import KvStore
from graftwork.serving.engine.prefix import PrefixCache
from graftwork.serving.engine.scheduler import Scheduler
from graftwork.serving.engine.types import STEP_S, EngineStats, FinishReason


class Counters:
    """Written by the engine's thread; other threads read whole numbers, each right by itself."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_s = 0.0
        self.step_times = [0] * (len(STEP_S) + 1)
        self.prompt_tokens = 0
        self.prompt_tokens_from_cache = 0
        self.generated_tokens = 0
        self.most_adapters_in_step = 0
        self.finished: Counter[FinishReason] = Counter()

    def step(self, seconds: float) -> None:
        """One step has taken so long."""
        self.step_s += seconds
        self.step_times[bisect_left(STEP_S, seconds)] += 1

    def snapshot(self, scheduler: Scheduler, kv: KvStore, cache: PrefixCache | None) -> EngineStats:
        """The counters beside the state of the queue and the memory."""
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_tokens_used=kv.used_tokens,
            kv_tokens_limit=kv.capacity,
            prefix_tokens_cached=cache.tokens if cache else 0,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_from_cache=self.prompt_tokens_from_cache,
            generated_tokens=self.generated_tokens,
            finished={str(reason): count for reason, count in dict(self.finished).items()},
            preemptions=scheduler.preemptions,
            most_adapters_in_step=self.most_adapters_in_step,
            step_s=self.step_s,
            step_times=tuple(self.step_times),
        )
