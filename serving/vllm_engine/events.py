"""vLLM's outputs become the events of a request: a token each, and exactly one last event."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from graftwork.serving.engine.types import FinishReason, TokenEvent

_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled", "error": "error"}


class VllmLogprob(Protocol):
    """The part of `vllm.logprobs.Logprob` that is told."""

    @property
    def logprob(self) -> float: ...
    @property
    def rank(self) -> int | None: ...


class Completion(Protocol):
    """The part of `vllm.outputs.CompletionOutput` that is read; with output_kind=DELTA, what is new since the last."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[Mapping[int, VllmLogprob]] | None: ...
    @property
    def finish_reason(self) -> str | None: ...


class VllmOutput(Protocol):
    """The part of `vllm.outputs.RequestOutput` that is read."""

    @property
    def outputs(self) -> Sequence[Completion]: ...
    @property
    def prompt_logprobs(self) -> Sequence[Mapping[int, VllmLogprob] | None] | None: ...
    @property
    def num_cached_tokens(self) -> int | None: ...


@dataclass
class Translator:
    """Events of one request. `top`: alternatives to be told at each token; `continuation`: tokens to be scored."""

    request_id: str
    top: int
    continuation: Sequence[int] = ()
    first: bool = True

    def events(self, output: VllmOutput) -> list[TokenEvent]:
        """Of one output; several tokens where the reader was slow. The last event may have no token (-1)."""
        [said] = output.outputs  # n=1
        reason = _reason(said.finish_reason)
        if self.continuation and output.prompt_logprobs:
            return [TokenEvent(self.request_id, -1, self._score(output.prompt_logprobs), "scored")]
        if self.continuation and reason in (None, "stop", "length"):
            return []
        places = said.logprobs or [{}] * len(said.token_ids)
        events = [
            self._token(token, place, output.num_cached_tokens or 0)
            for token, place in zip(said.token_ids, places, strict=True)
        ]
        if reason in (None, "stop", "length") and events:
            events[-1] = replace(events[-1], finish_reason=reason)
        elif reason is not None:
            error = f"vLLM ended it with finish_reason={said.finish_reason}" if reason == "error" else None
            events.append(TokenEvent(self.request_id, -1, None, reason, error))
        return events

    def _score(self, prompt: Sequence[Mapping[int, VllmLogprob] | None]) -> float:
        """The last tokens of the prompt are the continuation."""
        total = 0.0
        for token, place in zip(self.continuation, prompt[-len(self.continuation) :], strict=True):
            assert place is not None, "every token but a prompt's first has a probability"
            total += place[token].logprob
        return total

    def _token(self, token: int, place: Mapping[int, VllmLogprob], cached: int) -> TokenEvent:
        ranked = sorted((found.rank or 0, other, found.logprob) for other, found in place.items())
        top = tuple((other, logprob) for rank, other, logprob in ranked if 1 <= rank <= self.top)
        own = place[token].logprob if token in place else None
        event = TokenEvent(self.request_id, token, own, None, cached_tokens=cached if self.first else 0, top=top)
        self.first = False
        return event


def _reason(told: str | None) -> FinishReason | None:
    return None if told is None else _REASONS.get(told, "error")
