"""Plan of the next step: requests that decode, prompts that continue, requests that are admitted or preempted.

First come, first served by the time a request reached the endpoint, so that an adapter that had to be fetched costs its
request the fetch and not its place; `Scheduler._admit` has three exceptions. Every running request decodes one token a
step; prompts are computed in chunks of at most `prefill_tokens` a step in all, so that running answers go on. When KV
runs out, the latest arrival steps back into the queue and computes its tokens again later.

Background requests (shadow traffic) come after all others. While there is any other they keep their rows and stand
still; they step back as soon as one of the others finds no row, slot or memory.
Legend: N scored places, V vocabulary.
"""

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter

import torch

from graftwork.serving.engine.adapter_slots import AdapterSlots
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.kv_cache import BLOCK, KvRow, KvStore, PrefixCache
from graftwork.serving.engine.request import FinishReason, GenerateRequest, SamplerState, TokenEvent

SCORED_A_STEP = 128
"""Scored places a step over all requests. Each has logits of the whole vocabulary: 25 MB together for 49,152 tokens."""
_HEADROOM = 32
"""Tokens of answer a new row has room for at once, so that it does not move with its first tokens."""
_BACKGROUND_PREFILL = 16
"""Prompt tokens of a background step, so that a caller who comes in it waits about as long as for a decode step."""

Decode = Callable[[Sequence[int]], str]
Arrival = tuple[bool, float, int]
"""True for a background request; when it came; a number that no other has. Smaller goes first."""


class ScoredContinuation:
    """Log probabilities of one request's continuation. first: KV place of the prompt's last token.

    The place before a token tells how probable the token is, so the scored places begin with the prompt's last one and
    end before the continuation's last token, which is never computed.
    """

    def __init__(self, continuation: Sequence[int], first: int) -> None:
        self.first = first
        self._ids = tuple(continuation)
        self._logprobs = [math.nan] * len(self._ids)

    def take(self, places: range, logits_NV: torch.Tensor) -> None:
        """Notes the model's values at these places; a preempted request computes some of them again."""
        index = slice(places.start - self.first, places.stop - self.first)
        ids_N1 = torch.tensor(self._ids[index], device=logits_NV.device)[:, None]
        scores_NV = logits_NV.float()
        logprobs_N1 = scores_NV.gather(1, ids_N1) - scores_NV.logsumexp(-1, keepdim=True)
        self._logprobs[index] = logprobs_N1[:, 0].tolist()

    @property
    def total(self) -> float:
        """Natural log of the continuation's probability once every place was taken; not finite if a logit was not."""
        return sum(self._logprobs)


class RunningRequest:
    """State of one request, queued or running. The first `row.length` of its `tokens` have keys and values."""

    def __init__(
        self,
        arrival: Arrival,
        request: GenerateRequest,
        on_event: Callable[[TokenEvent], None],
        adapter: LoadedAdapter | None,
    ) -> None:
        self.arrival, self.request, self.on_event = arrival, request, on_event
        self.version = request.adapter
        """Its adapter; None is the base."""
        self.slot: LoadedAdapter | None = None
        """The adapter on the engine's device; set while the request runs."""
        self.row: KvRow | None = None
        self.scheduled = 0
        """Tokens that the planned step computes, from `row.length` on."""
        self.times_overtaken = 0
        """Younger requests that were admitted before it while it had no slot."""
        self.cached_tokens = 0
        self.prefix_keys: Sequence[bytes] = ()
        """Of the whole blocks before the prompt's last token, which is always computed; () shares no prefix."""
        self.virtual_tokens = adapter.virtual_tokens.count if adapter and adapter.virtual_tokens else 0
        self.tokens = [*[0] * self.virtual_tokens, *request.prompt_ids, *request.continuation[:-1]]
        """Virtual ones (0: they are not in the table), the prompt, the answer or all but the last to be scored."""
        self.prompt_end = self.virtual_tokens + len(request.prompt_ids)
        self.scoring = ScoredContinuation(request.continuation, self.prompt_end - 1) if request.continuation else None
        """The continuation that is scored; None where one is generated."""
        self.sampler = SamplerState(request.sampling, request.prompt_ids, request.stop_ids, request.grammar)
        """State of the sampler; it stays when the request steps back into the queue."""

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while decoding."""
        return len(self.tokens) - (self.row.length if self.row else 0)

    @property
    def scored(self) -> range:
        """Places of the planned step whose next token is given."""
        assert self.row is not None, "a running request has a KV row"
        assert self.scoring is not None, "a continuation is scored"
        return range(max(self.row.length, self.scoring.first), self.row.length + self.scheduled)

    def append(self, token_id: int, decode: Decode | None) -> FinishReason | None:
        """Takes the next token; the reason where the answer ends with it."""
        self.tokens.append(token_id)
        sampling = self.request.sampling
        if token_id in self.request.stop_ids:
            return "stop"
        self.sampler.take(token_id)
        matcher = self.sampler.matcher
        if (matcher is not None and matcher.finished) or (sampling.stop and decode and self._completes_stop(decode)):
            return "stop"
        return "length" if len(self.tokens) - self.prompt_end >= sampling.max_new_tokens else None

    def _completes_stop(self, decode: Decode) -> bool:
        """True: the last tokens' text holds a stop string. A character is at most 4 tokens of a byte-level BPE."""
        longest = max(len(text) for text in self.request.sampling.stop)
        tail = decode(self.tokens[self.prompt_end :][-(4 * longest + 4) :])
        return any(text in tail for text in self.request.sampling.stop)


class Scheduler:
    """Queue and running set. The engine's thread alone uses it."""

    def __init__(
        self, kv: KvStore, cache: PrefixCache | None, slots: AdapterSlots, *, max_batch: int, prefill_tokens: int
    ) -> None:
        self._kv, self._cache, self._slots = kv, cache, slots
        self._max_batch, self._prefill_tokens = max_batch, prefill_tokens
        self._tokens_left = self._scores_left = 0
        """Prompt tokens that the step being planned may still compute, and places that it may score."""
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []  # both in order of arrival
        self.preemptions = 0

    def add(self, request: RunningRequest) -> None:
        """Queues a request at its place by arrival."""
        insort(self.waiting, request, key=attrgetter("arrival"))

    def remove(self, request: RunningRequest, *, wipe: bool = False) -> None:
        """Takes a request out and frees its KV and slot. wipe: its KV may hold inf or nan."""
        (self.running if request in self.running else self.waiting).remove(request)
        if request.row is not None:
            self._kv.free(request.row, wipe=wipe)
            request.row = None
        if request.slot is not None:
            self._slots.release(request.slot.version)
            request.slot = None

    def schedule(self) -> tuple[list[RunningRequest], list[RunningRequest]]:
        """Decide what the next step computes: decoding requests by KV place, then requests with a prompt by adapter.

        Each computes `scheduled` tokens. Both are empty where nothing is queued or running. Allocates, moves KV rows.
        """
        background = all(one.request.background for one in (*self.running[:1], *self.waiting[:1]))  # they sort last
        self._grow_or_preempt(background)
        self._tokens_left = min(self._prefill_tokens, _BACKGROUND_PREFILL) if background else self._prefill_tokens
        self._scores_left = SCORED_A_STEP
        prompts = self._continue_prefills(background)
        prompts += self._admit(background)
        if self._preempt_background():
            prompts += self._admit(background)
        self._kv.close_gaps()
        decoding = [one for one in self._running_of(background) if one.remaining == 1]
        for request in decoding:
            request.scheduled = 1
        prompts = [request for request in prompts if request.remaining > 1 and request.scheduled > 0]
        decoding.sort(key=attrgetter("row.start"))
        prompts.sort(key=lambda request: request.version or "")
        return decoding, prompts

    def _running_of(self, background: bool) -> list[RunningRequest]:
        """Running requests that this kind of step computes."""
        return [one for one in self.running if one.request.background == background]

    def _grow_or_preempt(self, background: bool) -> None:
        """Give each running request room for one more token; the latest arrivals step back where KV runs out."""
        for request in self._running_of(background):
            while request.row is not None and not self._kv.grow(request.row, request.row.length + 1):
                assert len(self.running) > 1, "a single request always fits: see KvStore"
                self._preempt(self.running[-1])

    def _continue_prefills(self, background: bool) -> list[RunningRequest]:
        """Assign tokens to running requests whose prompt is not computed yet; returns those requests."""
        prompts = []
        for request in self._running_of(background):
            if request.remaining > 1 and self._tokens_left > 0:
                self._assign_tokens(request)
                prompts.append(request)
        return prompts

    def _preempt_background(self) -> bool:
        """Preempt the background requests if any other request still waits. True: their rows and slots are free.

        Background requests are queued after all others, so the first in the queue decides.
        """
        background = self._running_of(True)
        if not background or not self.waiting or self.waiting[0].request.background:
            return False
        for request in background:
            self._preempt(request)
        return True

    def _preempt(self, request: RunningRequest) -> None:
        self.remove(request)
        self.add(request)
        self.preemptions += 1

    def _assign_tokens(self, request: RunningRequest) -> None:
        """Assign this step's token budget to the request (chunked prefill); may be 0."""
        request.scheduled = min(request.remaining, self._tokens_left)
        if request.scoring is not None and request.row is not None:
            before = max(request.scoring.first - request.row.length, 0)
            request.scheduled = min(request.scheduled, before + self._scores_left)
            self._scores_left -= len(request.scored)
        self._tokens_left -= request.scheduled

    def _admit(self, background: bool) -> list[RunningRequest]:
        """Start waiting requests, the first to come first, while there are tokens, rows and memory left for them.

        A request whose next block is being computed by another one right now waits for it, and then shares it.
        Exceptions from first come, first served, each bounded:

        1. No slot: `_lacks_slot` lets younger ones overtake that need none.
        2. Half the rows: `_candidates` offers the requests of a flood after all others.
        3. A request that the KV memory has no room for waits at the head: no other overtakes it, or a long one would
           never run.
        """
        waiting = [one for one in self.waiting if one.request.background == background]
        if not waiting:
            return []
        rows = Counter(one.version for one in self.running)
        reserved = self._slots_reserved_for_overdue(waiting)
        underway = {key for one in self._running_of(background) if one.remaining > 1 for key in one.prefix_keys}
        admitted: list[RunningRequest] = []
        skipped_for_slot: list[RunningRequest] = []
        for request, deferred in self._candidates(waiting, rows):
            if self._tokens_left <= 0 or len(self.running) >= self._max_batch:
                break
            if self._lacks_slot(request, reserved):
                if not deferred:
                    skipped_for_slot.append(request)
                continue
            keys = request.prefix_keys
            cached = self._cache.match(keys) if self._cache else 0
            if cached < len(keys) and keys[cached] in underway:
                continue
            if not self._start(request, cached):
                break
            self._assign_tokens(request)
            admitted.append(request)
            rows[request.version] += 1
            underway.update(keys)
            _count_overtaken(skipped_for_slot, request)
        return admitted

    def _candidates(
        self, waiting: Sequence[RunningRequest], rows: Counter[str | None]
    ) -> Iterator[tuple[RunningRequest, bool]]:
        """(waiting request, True where it was deferred), in the order in which they are offered a row.

        While others wait, one adapter (or the base) takes at most half of the rows, so that a flood of one tenant
        doubles the others' time at worst. Rows that nobody else can use go to the flood. rows: by version, kept up to
        date by the caller between two candidates.
        """
        deferred = []
        for request in waiting:
            if rows[request.version] >= max(1, self._max_batch // 2):
                deferred.append(request)
            else:
                yield request, False
        for request in deferred:
            yield request, True

    def _lacks_slot(self, request: RunningRequest, reserved: Mapping[str, RunningRequest]) -> bool:
        """True: its adapter has no slot and all are busy, or the adapter's slot is reserved for an older request.

        Younger requests that need no slot overtake it, but not permanently: see `_slots_reserved_for_overdue`.
        """
        if request.version is None:
            return False
        owner = reserved.get(request.version)
        return not self._slots.can_acquire(request.version) or (owner is not None and owner.arrival < request.arrival)

    def _slots_reserved_for_overdue(self, waiting: Sequence[RunningRequest]) -> dict[str, RunningRequest]:
        """{busy version: the request that gets its slot next, until when the version admits no younger one}.

        Once `max_batch` requests have overtaken one that has no slot, it gets that of the busy version with the fewest
        running requests, which empties soonest. A version under constant traffic is never emptied for others that could
        wait for one of the many short ones, and no version blocks another permanently.
        """
        overdue: dict[str, RunningRequest] = {}
        for one in waiting:
            if (
                one.version is not None
                and one.times_overtaken >= self._max_batch
                and not self._slots.can_acquire(one.version)
            ):
                overdue.setdefault(one.version, one)
        return dict(zip(self._slots.by_load(), overdue.values(), strict=False)) if overdue else {}

    def _start(self, request: RunningRequest, cached: int) -> bool:
        """Gives the request a row with its `cached` blocks of prefix in it, and a slot. False: no memory now."""
        left = (
            0 if request.scoring else request.request.sampling.max_new_tokens - len(request.tokens) + request.prompt_end
        )
        row = self._kv.allocate(len(request.tokens) + min(left, _HEADROOM))
        if row is None:
            return False
        request.row = row
        if request.version is not None:
            request.slot = self._slots.acquire(request.version)
            if request.slot.virtual_tokens is not None:
                self._kv.write_prefix(row, request.slot.virtual_tokens)
        if cached * BLOCK > row.length and self._cache is not None:
            self._cache.fetch(request.prefix_keys[:cached], row)
        request.cached_tokens = max(row.length - request.virtual_tokens, 0)
        request.times_overtaken = 0
        self.waiting.remove(request)
        insort(self.running, request, key=attrgetter("arrival"))
        return True


def _count_overtaken(skipped: Sequence[RunningRequest], admitted: RunningRequest) -> None:
    for older in skipped:
        if older.arrival < admitted.arrival:
            older.times_overtaken += 1
