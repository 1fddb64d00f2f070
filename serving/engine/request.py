"""Data that enters and leaves the engine: requests, events, adapter states, counters, checks, and a sampler's state.

Plain data, without torch. Random numbers are a function of the request's seed and the token's place.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

import numpy
import numpy.typing

from graftwork.errors import DataError
from graftwork.serving.engine.grammar import Grammar, Matcher

FinishReason = Literal["stop", "length", "scored", "cancelled", "error"]
STEP_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
"""Bounds of `EngineStats.step_times`."""


class SamplingError(DataError):
    """A sampling value outside its range. `asked` begins with the parameter's name."""


MIN_REPETITION_PENALTY = 0.01
"""A logit divided by far less is inf: then no token may come next."""
MAX_TOP_LOGPROBS = 20
"""Alternatives at one place at most, as in the OpenAI API."""


@dataclass(frozen=True)
class SamplingParams:
    """Settings of the sampler for one request.

    The logits are changed in this order: `logit_bias`, `repetition_penalty`, `frequency_penalty`, `presence_penalty`,
    stop ids (`min_new_tokens`), the grammar; then `temperature` scales them, and `top_k`, `top_p` and `min_p` cut what
    is left. Temperature 0 takes the largest and ignores the cuts and `seed`.
    """

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
    min_p: float = 0.0
    """Drops tokens less probable than this share of the most probable one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer are divided by it where positive, multiplied where negative (CTRL)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as the answer holds the token."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens that the answer holds."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit)."""
    min_new_tokens: int = 0
    """Stop ids can't be chosen before so many tokens; a stop string still ends the answer."""
    logprobs: int | None = None
    """None tells no log probability; 0 the chosen token's; n also those of the n most probable tokens."""

    def problem(self) -> tuple[str, str, str] | None:
        """The parameter that is wrong, its value, and the rule it breaks; or None."""
        biased, biases = zip(*self.logit_bias, strict=True) if self.logit_bias else ((), ())
        finite_once = all(map(math.isfinite, biases)) and len(set(biased)) == len(biased)
        penalty = MIN_REPETITION_PENALTY <= self.repetition_penalty < math.inf
        logprobs = self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least one token is generated"),
            ("temperature", 0 <= self.temperature < math.inf, "it is a finite number from 0"),
            ("top_p", 0 < self.top_p <= 1, "it is above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "it is a whole number from 0"),
            ("min_p", 0 <= self.min_p <= 1, "it is from 0 to 1"),
            ("repetition_penalty", penalty, f"it is a finite number from {MIN_REPETITION_PENALTY}"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "it is a finite number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "it is a finite number"),
            ("logit_bias", finite_once, "finite numbers, one a token"),
            ("stop", all(self.stop), "a stop string has at least one character"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "it is from 0 to max_new_tokens"),
            ("logprobs", logprobs, f"it is from 0 to {MAX_TOP_LOGPROBS}"),
        )
        return next(((key, repr(getattr(self, key)), rule) for key, right, rule in rules if not right), None)


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
    grammar: Grammar | None = None
    """Form of the answer. The answer ends with "stop" once it is whole and nothing may follow."""
    continuation: tuple[int, ...] = ()
    """Tokens to score; where given, nothing is generated: the one event has finish_reason="scored" and, as its
    `logprob`, the sum over these tokens, each given the prompt and the ones before it."""
    background: bool = False
    """Computed in steps that have nothing else to do: it holds no row, slot or memory that another one could use."""
    cache_salt: str = ""
    """Requests share cached prefixes with those of the same salt alone; at most 64 bytes."""
    arrived: float | None = None
    """`time.perf_counter` when it reached the endpoint, loads and retrieval before it; its place in the queue."""


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, or the end of a request. Exactly one event of a request has a finish_reason: the last."""

    request_id: str
    token_id: int
    """-1 where the request ended without a new token (scored, cancelled, error)."""
    logprob: float | None
    """Natural log of the token's probability under the model (temperature 1, no logit changed); None: not asked for."""
    finish_reason: FinishReason | None
    error: str | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache; set on the first event."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability) of the most probable tokens, best first, as many as `logprobs` asks for."""


@dataclass(frozen=True)
class SlotState:
    """One loaded adapter version."""

    version: str
    rank: int
    """Largest LoRA rank, or bottleneck, over its modules; 0 for an adapter without either."""
    size_bytes: int
    """Of its host copy."""
    running: int
    """Requests that hold it now, waiting ones included."""
    retired: bool
    """True: takes no new request and is freed when `running` gets to 0."""
    in_slot: bool = False
    """Ready to be computed with; else in host memory."""


@dataclass
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
    step_times: tuple[int, ...] = (0,) * (len(STEP_S) + 1)
    """Steps by their time: up to each of STEP_S seconds, and above."""


def check_request(request: GenerateRequest, *, max_seq_len: int, vocab_size: int, decodes: bool) -> None:
    """Raises DataError (prompt empty or too long, token id out of range, a continuation that is scored and sampling or
    a grammar), SamplingError (a value out of its range).

    decodes: the engine can turn ids into text, which stop strings need.
    """
    name, length = f"request {request.request_id!r}", len(request.prompt_ids)
    if length == 0:
        raise DataError(name, "an empty prompt", "a prompt has at least one token")
    known = request.prompt_ids + request.continuation
    low, high = min(known), max(known)
    if low < 0 or high >= vocab_size:
        raise DataError(name, f"token id {low if low < 0 else high}", f"token ids are from 0 to {vocab_size - 1}")
    if request.continuation:
        _check_scored(request, name, max_seq_len)
        return
    if length + request.sampling.max_new_tokens > max_seq_len:
        found = f"{length} prompt tokens + max_new_tokens={request.sampling.max_new_tokens}"
        rule = f"prompt and answer fit into engine.max_seq_len={max_seq_len}"
        raise DataError(name, found, rule, "shorten the prompt, lower max_new_tokens or raise engine.max_seq_len")
    problem = request.sampling.problem()
    if problem:
        raise SamplingError(f"{problem[0]}={problem[1]}", "", problem[2])
    for key, ids in (("logit_bias", dict(request.sampling.logit_bias)), ("stop_ids", request.stop_ids)):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise SamplingError(f"{key}: token id {outside[0]}", "", f"token ids are from 0 to {vocab_size - 1}")
    if request.sampling.stop and not decodes:
        raise DataError(name, "stop strings", "stop strings need an engine that was given `decode`")


def _check_scored(request: GenerateRequest, name: str, max_seq_len: int) -> None:
    if request.sampling != SamplingParams() or request.stop_ids or request.grammar is not None:
        found = "a continuation, and sampling, stop ids or a grammar"
        raise DataError(name, found, "nothing is generated where a continuation is scored", "leave one of the two out")
    total = len(request.prompt_ids) + len(request.continuation)
    if total > max_seq_len:
        found, rule = f"{total} tokens of prompt and continuation", f"they fit into engine.max_seq_len={max_seq_len}"
        raise DataError(name, found, rule, "shorten one of them or raise engine.max_seq_len")


class SamplerState:
    """State of one request for the sampler. It exists as long as the request, so a preempted one goes on unchanged.

    stop_ids: tokens that `min_new_tokens` holds back.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        stop_ids: frozenset[int] = frozenset(),
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self.place = 0
        """Tokens chosen so far."""
        self.matcher: Matcher | None = grammar.matcher() if grammar is not None else None
        penalised = params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
        self.seen = TokenCounts(prompt_ids if params.repetition_penalty != 1 else ()) if penalised else None
        self.bias_ids = numpy.array([token for token, _ in params.logit_bias], numpy.int64)
        self.biases = numpy.array([bias for _, bias in params.logit_bias], numpy.float32)
        self.held_back = numpy.array(sorted(stop_ids) if params.min_new_tokens else [], numpy.int64)
        self.edits = bool(self.matcher or self.seen or len(self.bias_ids) or len(self.held_back))
        """Something changes this row's logits."""
        self.cuts = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        """Some tokens can't be drawn."""
        self._seed = spread(params.seed) if params.temperature > 0 else 0

    def take(self, token_id: int) -> None:
        """The answer goes on with this token."""
        self.place += 1
        if self.seen is not None:
            self.seen.count(token_id)
        if self.matcher is not None:
            self.matcher.take(token_id)

    def uniform(self) -> float:
        """The number in [0, 1) that decides this place."""
        return uniform(self._seed, self.place)


class TokenCounts:
    """Tokens of prompt and answer, each once, with how often the answer holds it. Grows with the answer."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        ids = list(dict.fromkeys(prompt_ids))
        self._spots = {token: spot for spot, token in enumerate(ids)}
        self._ids = numpy.array(ids, numpy.int64)
        self._counts = numpy.zeros(len(ids), numpy.float32)

    def count(self, token_id: int) -> None:
        """The answer holds this token once more."""
        spot = self._spots.setdefault(token_id, len(self._spots))
        if spot == len(self._ids):  # room for twice as many, so that a token is copied about once
            room = max(16, len(self._ids))
            self._ids = numpy.concatenate([self._ids, numpy.zeros(room, numpy.int64)])
            self._counts = numpy.concatenate([self._counts, numpy.zeros(room, numpy.float32)])
        self._ids[spot] = token_id
        self._counts[spot] += 1

    @property
    def ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """Different tokens."""
        return self._ids[: len(self._spots)]

    @property
    def counts(self) -> numpy.typing.NDArray[numpy.float32]:
        """Number of times that the answer holds each of `ids`."""
        return self._counts[: len(self._spots)]


_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def spread(seed: int | None) -> int:
    """64 bits; neighbouring seeds far apart, so that their streams are not shifts of each other. None: fresh ones."""
    if seed is None:
        return secrets.randbits(64)
    return int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest())


def uniform(state: int, place: int) -> float:
    """A number in [0, 1): SplitMix64's output number `place`, its upper 53 bits.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    z = (state + (place + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of one of several answers to one request; the first answer is that of a request for one."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()) >> 1
