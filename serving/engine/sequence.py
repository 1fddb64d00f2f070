"""One request while it is queued or running."""

from collections.abc import Callable, Sequence

from graftwork.serving.engine.given import ScoredContinuation
from graftwork.serving.engine.kv import KvRow
from graftwork.serving.engine.prefix import block_keys
from graftwork.serving.engine.row import SamplerState
from graftwork.serving.engine.slots import LoadedAdapter
from graftwork.serving.engine.types import FinishReason, GenerateRequest, TokenEvent

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
