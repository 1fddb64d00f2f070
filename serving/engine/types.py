"""What goes into the engine and what comes out: requests, events, adapter states and counters. Plain data, no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. `temperature` 0 is greedy and ignores `top_p`, `top_k` and `seed`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    """Smallest set of most probable tokens with at least this probability; 1.0 keeps all."""
    top_k: int = 0
    """The k most probable tokens; 0 keeps all."""
    seed: int | None = None
    """Same seed, prompt and parameters give the same tokens whatever else runs; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer. The token that completes one is sent, with finish_reason="stop"; the reader cuts."""

    def problem(self) -> tuple[str, str] | None:
        """What is wrong with the values and the rule it breaks, or None."""
        if self.max_new_tokens < 1:
            return f"max_new_tokens={self.max_new_tokens}", "at least one token is generated"
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            return f"temperature={self.temperature}", "the temperature is a finite number from 0"
        if not 0 < self.top_p <= 1:
            return f"top_p={self.top_p}", "top_p is above 0 and at most 1"
        if self.top_k < 0:
            return f"top_k={self.top_k}", "top_k is a whole number from 0"
        if any(not text for text in self.stop):
            return "an empty stop string", "a stop string has at least one character"
        return None


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to continue, pinned to one adapter version."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    """A token of these ends the answer; it is sent as the last event with finish_reason="stop"."""
    adapter: str | None = None
    """Version digest given to `Engine.load_adapter`; None is the base model."""


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, or the end of a request. Exactly one event of a request has a finish_reason: the last."""

    request_id: str
    token_id: int
    """-1 where the request ended without a new token (cancelled, error)."""
    logprob: float | None
    """Natural log of the token's probability under the model (temperature 1, before top-k and top-p)."""
    finish_reason: FinishReason | None
    error: str | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache; set on the first event."""


@dataclass(frozen=True)
class SlotState:
    """One loaded adapter version."""

    version: str
    rank: int
    """Largest rank over its modules."""
    size_bytes: int
    running: int
    """Requests that hold it now, waiting ones included."""
    retired: bool
    """True: takes no new request and is freed when `running` gets to 0."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start and the state now."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_limit: int = 0
    prefix_tokens_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of all requests that got a token, cached ones included; each request counts once."""
    prompt_tokens_from_cache: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Requests ended, by finish_reason."""
    preemptions: int = 0
    most_adapters_in_step: int = 0
    """Distinct adapter versions, the base not counted, in the step that mixed the most."""
    step_s: float = 0.0
    """Seconds spent in steps (forward, sampling, events)."""
