"""What the choice of one request's next token depends on, beside its logits: parameters, place, tokens so far."""

from collections.abc import Sequence

import numpy
import numpy.typing

from graftwork.serving.engine.grammar import Grammar, Matcher
from graftwork.serving.engine.seed import spread, uniform
from graftwork.serving.engine.types import SamplingParams


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
