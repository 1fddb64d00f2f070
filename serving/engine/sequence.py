"""One request while it is queued or running: its tokens, the sampler's state, the scores of a given continuation.

The place before a token tells how probable the token is, so the scored places of a continuation begin with the prompt's
last one and end before the continuation's last token, which is never computed. Random numbers are a function of the
request's seed and the token's place. Legend: N scored places, V vocabulary.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy
import numpy.typing
import torch

from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.grammar import Grammar, Matcher
from graftwork.serving.engine.kv_cache import KvRow, block_keys
from graftwork.serving.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenEvent

SCORED_A_STEP = 128
"""Scored places a step over all requests. Each has logits of the whole vocabulary: 25 MB together for 49,152 tokens."""


class ScoredContinuation:
    """What is known of one request's continuation. first: KV place of the prompt's last token."""

    def __init__(self, continuation: Sequence[int], first: int) -> None:
        self.first = first
        self._ids = tuple(continuation)
        self._logprobs = [math.nan] * len(self._ids)

    def scored_range(self, start: int, count: int) -> range:
        """The scored ones among `count` places from `start` on."""
        return range(max(start, self.first), start + count)

    def within(self, start: int, count: int, limit: int) -> int:
        """`count`, or the fewer tokens from `start` on that score at most `limit` places."""
        return min(count, max(self.first - start, 0) + limit)

    def take(self, places: range, logits_NV: torch.Tensor) -> None:
        """What the model says at these places; a preempted request tells some of them again."""
        index = slice(places.start - self.first, places.stop - self.first)
        ids_N1 = torch.tensor(self._ids[index], device=logits_NV.device)[:, None]
        scores_NV = logits_NV.float()
        told_N1 = scores_NV.gather(1, ids_N1) - scores_NV.logsumexp(-1, keepdim=True)
        self._logprobs[index] = told_N1[:, 0].tolist()

    @property
    def total(self) -> float:
        """Natural log of the continuation's probability once every place was taken; not finite if a logit was not."""
        return sum(self._logprobs)


class SamplerState:
    """State of one request for the sampler. It lives as long as the request, so a preempted one goes on unchanged.

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
        self.seen = TokenCounts(prompt_ids if params.repetition_penalty != 1 else ()) if _penalises(params) else None
        self.bias_ids, self.biases = _columns(params.logit_bias)
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
    def ids(self) -> "numpy.typing.NDArray[numpy.int64]":
        """Different tokens."""
        return self._ids[: len(self._spots)]

    @property
    def counts(self) -> "numpy.typing.NDArray[numpy.float32]":
        """How often the answer holds each of `ids`."""
        return self._counts[: len(self._spots)]


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _columns(
    bias: Sequence[tuple[int, float]],
) -> tuple["numpy.typing.NDArray[numpy.int64]", "numpy.typing.NDArray[numpy.float32]"]:
    ids, values = zip(*bias, strict=True) if bias else ((), ())
    return numpy.array(ids, numpy.int64), numpy.array(values, numpy.float32)


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


Decode = Callable[[Sequence[int]], str]
Arrival = tuple[bool, float, int]
"""Whether it is for idle steps only; when it came; a number that no other has. Smaller goes first."""


class RunningRequest:
    """State of one request. Its places are `virtual_tokens` places of its adapter, then `tokens`; the first `computed`
    have keys and values, the rest is to be computed.
    """

    def __init__(
        self,
        arrival: Arrival,
        request: GenerateRequest,
        on_event: Callable[[TokenEvent], None],
        adapter: LoadedAdapter | None,
    ) -> None:
        self.arrival = arrival
        self.request = request
        self.on_event = on_event
        self.adapter = adapter
        """The host copy, held until the request ends."""
        self.slot: LoadedAdapter | None = None
        """Where it is computed with; set while the request runs."""
        self.passed = 0
        """Younger requests that came in before it while it had no slot."""
        self.virtual_tokens = (
            adapter.virtual_tokens.count if adapter is not None and adapter.virtual_tokens is not None else 0
        )
        self.tokens: list[int] = [*request.prompt_ids, *request.continuation[:-1]]
        self.given = (
            ScoredContinuation(request.continuation, self.virtual_tokens + len(request.prompt_ids) - 1)
            if request.continuation
            else None
        )
        """The continuation that is scored; None where one is generated."""
        self.row: KvRow | None = None
        self.choosing = SamplerState(request.sampling, request.prompt_ids, request.stop_ids, request.grammar)
        """What its tokens are chosen by; kept when the request steps back into the queue."""
        self.cached_tokens = 0
        self.cancelled = False
        self._keys: list[bytes] | None = None

    @property
    def version(self) -> str | None:
        """Its adapter; None is the base."""
        return self.request.adapter

    @property
    def computed(self) -> int:
        return self.row.length if self.row else 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while decoding."""
        return self.places - self.computed

    @property
    def places(self) -> int:
        """KV places of all that is known now."""
        return self.virtual_tokens + len(self.tokens)

    def ids(self, start: int, count: int) -> list[int]:
        """Token ids of `count` places from `start` on. Virtual ones are 0: what they stand for is not in the table."""
        begin = start - self.virtual_tokens
        if begin >= 0:
            return self.tokens[begin : begin + count]
        virtual = min(-begin, count)
        return [0] * virtual + self.tokens[: count - virtual]

    @property
    def to_generate(self) -> int:
        """Tokens that may still come."""
        return 0 if self.given is not None else self.request.sampling.max_new_tokens - len(self.generated)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    @property
    def prefix_keys(self) -> list[bytes]:
        """Keys of the whole blocks of lead and prompt, without the last token's (one token is always computed)."""
        if self._keys is None:
            version = self.adapter.version if self.adapter else None
            self._keys = block_keys(
                version, (0,) * self.virtual_tokens + self.request.prompt_ids[:-1], self.request.cache_salt
            )
        return self._keys

    def append(self, token_id: int, decode: Decode | None) -> FinishReason | None:
        """Takes the next token; says whether the answer ends with it."""
        self.tokens.append(token_id)
        sampling = self.request.sampling
        if token_id in self.request.stop_ids:
            return "stop"
        self.choosing.take(token_id)
        matcher = self.choosing.matcher
        if (matcher is not None and matcher.finished) or (sampling.stop and decode and self._completes_stop(decode)):
            return "stop"
        return "length" if len(self.generated) >= sampling.max_new_tokens else None

    def _completes_stop(self, decode: Decode) -> bool:
        """Whether the last tokens' text holds a stop string. A character is at most 4 tokens of a byte-level BPE."""
        longest = max(len(text) for text in self.request.sampling.stop)
        tail = decode(self.generated[-(4 * longest + 4) :])
        return any(text in tail for text in self.request.sampling.stop)
