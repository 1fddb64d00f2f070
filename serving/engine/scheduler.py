"""Plan of the next step: requests that decode, prompts that continue, requests that are admitted or preempted.

First come, first served by the time a request reached the endpoint, so that an adapter that had to be fetched costs its
request the fetch and not its place. `Admission` has three exceptions. Every running request decodes one token a step;
prompts are computed in chunks of at most `prefill_tokens` a step in all, so that running answers go on. When KV runs
out, the latest arrival steps back into the queue and computes its tokens again later.

Requests for idle steps (shadow traffic) come after all others. While there is any other they keep their rows and stand
still; they step back as soon as one of the others finds no row, slot or memory.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graftwork.serving.engine.adapter_slots import AdapterSlots
from graftwork.serving.engine.attention import by_place
from graftwork.serving.engine.kv_cache import BLOCK, KvRow, KvStore, PrefixCache
from graftwork.serving.engine.request import STEP_S, EngineStats, FinishReason
from graftwork.serving.engine.sequence import SCORED_A_STEP, Arrival, RunningRequest


class Admission:
    """Order in which waiting requests are offered a row. A slot is taken only while a request runs.

    Exceptions from first come, first served, each bounded:

    1. No slot. A request whose adapter has no slot, where every slot is busy, lets younger ones pass that need none.
       Once `max_batch` of them have passed it, the busy version with the fewest running requests admits no younger
       one, so its slot empties soonest and goes to the one that waits. A version under constant traffic is never
       emptied for others that could wait for one of the many short ones, and no version blocks another permanently.
    2. Half the rows. While others wait, one adapter (or the base) takes at most half of the rows, so that a flood of
       one tenant doubles the others' time at worst. Rows that nobody else can use go to the flood.
    3. A request that the KV memory has no room for waits at the head: no other passes it, or a long one would never
       run.
    """

    def __init__(self, slots: AdapterSlots, *, max_batch: int) -> None:
        self._slots = slots
        self._bypass = max_batch
        self._share = max(1, max_batch // 2)
        self._rows: Counter[str | None] = Counter()
        self._held_up: list[RunningRequest] = []

    def offers(self, waiting: Sequence[RunningRequest], running: Sequence[RunningRequest]) -> Iterator[RunningRequest]:
        """Requests to seat, one at a time, `came_in` for each that gets a row. The caller stops when there is no more.

        waiting: by arrival.
        """
        self._rows = Counter(request.version for request in running)
        self._held_up = []
        closed = self._closed(waiting)
        crowded: list[RunningRequest] = []
        for request in waiting:
            if self._rows[request.version] >= self._share:
                crowded.append(request)
            elif self._no_slot(request, closed):
                self._held_up.append(request)
            else:
                yield request
        for request in crowded:
            if not self._no_slot(request, closed):
                yield request

    def came_in(self, request: RunningRequest) -> None:
        """An offered request runs now: older ones that have no slot remember it."""
        self._rows[request.version] += 1
        request.passed = 0
        for older in self._held_up:
            older.passed += older.arrival < request.arrival

    def _no_slot(self, request: RunningRequest, closed: dict[str, RunningRequest]) -> bool:
        version = request.version
        if version is None:
            return False
        waits = closed.get(version)
        return not self._slots.can_acquire(version) or (waits is not None and waits.arrival < request.arrival)

    def _closed(self, waiting: Sequence[RunningRequest]) -> dict[str, RunningRequest]:
        """{busy version: the request that was passed too often and waits for its slot}."""
        overdue: dict[str, RunningRequest] = {}
        for request in waiting:
            version = request.version
            if version is not None and request.passed >= self._bypass and not self._slots.can_acquire(version):
                overdue.setdefault(version, request)
        return dict(zip(self._slots.by_load(), overdue.values(), strict=False))


_HEADROOM = 32
"""Tokens of answer a new row has room for at once, so that it does not move with its first tokens."""
_IDLE_PREFILL = 16
"""Prompt tokens of an idle step, so that a caller who comes in it waits about as long as for a decode step."""


@dataclass(frozen=True)
class ScheduledTokens:
    """`count` tokens of one request, from `request.computed` on."""

    request: RunningRequest
    count: int

    @property
    def finishes(self) -> bool:
        """Whether the next token can be chosen afterwards; of a given continuation, whether it is scored whole."""
        return self.count == self.request.remaining

    @property
    def scored(self) -> range:
        """Its places whose next token is given."""
        given = self.request.given
        return given.scored_range(self.request.computed, self.count) if given is not None else range(0)

    @property
    def wanted(self) -> range:
        """Which of its tokens' logits are looked at."""
        if self.request.given is not None:
            return range(self.count - len(self.scored), self.count)
        return range(self.count - 1, self.count) if self.finishes else range(0)


@dataclass(frozen=True)
class SchedulerOutput:
    """Decoding requests in the order of their KV places, then prompt chunks grouped by adapter."""

    decoding: list[ScheduledTokens]
    prompts: list[ScheduledTokens]

    def __bool__(self) -> bool:
        return bool(self.decoding or self.prompts)

    def works(self) -> Iterator[ScheduledTokens]:
        yield from self.decoding
        yield from self.prompts


@dataclass
class _StepBudget:
    """What one step may still compute of prompts, and score of given continuations."""

    tokens: int
    scores: int

    @property
    def spent(self) -> bool:
        return self.tokens <= 0

    def work(self, request: RunningRequest) -> ScheduledTokens:
        """As much of the request as is left for it, maybe nothing."""
        count = min(request.remaining, self.tokens)
        if request.given is not None:
            count = request.given.within(request.computed, count, self.scores)
        work = ScheduledTokens(request, count)
        self.tokens -= count
        self.scores -= len(work.scored)
        return work


class Scheduler:
    """Queue and running set. The engine's thread alone uses it."""

    def __init__(
        self, kv: KvStore, cache: PrefixCache | None, slots: AdapterSlots, *, max_batch: int, prefill_tokens: int
    ) -> None:
        self._kv, self._cache, self._slots = kv, cache, slots
        self._admission = Admission(slots, max_batch=max_batch)
        self._max_batch, self._prefill_tokens = max_batch, prefill_tokens
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []  # both in order of arrival
        self.preemptions = 0

    def add(self, request: RunningRequest) -> None:
        """Queues a request at its place by arrival."""
        insort(self.waiting, request, key=_arrival)

    def remove(self, request: RunningRequest, *, wipe: bool = False) -> None:
        """Takes a finished or cancelled request out and frees its KV. wipe: its KV may hold inf or nan."""
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request, wipe=wipe)

    def plan(self) -> SchedulerOutput:
        """The next step's work; empty when nothing is queued or running. Allocates and moves KV rows."""
        self._reserve_decode_memory()
        tokens = self._prefill_tokens if self._busy() else min(self._prefill_tokens, _IDLE_PREFILL)
        budget = _StepBudget(tokens, SCORED_A_STEP)
        prompts = [budget.work(request) for request in self._active() if request.remaining > 1 and budget.tokens > 0]
        prompts += self._admit(budget)
        if self._preempt_idle():
            prompts += self._admit(budget)
        self._kv.close_gaps()
        decoding = [ScheduledTokens(request, 1) for request in self._active() if request.remaining == 1]
        prompts = [work for work in prompts if work.request.remaining > 1 and work.count > 0]
        decoding.sort(key=lambda work: by_place(_row(work.request)))
        prompts.sort(key=lambda work: work.request.adapter.version if work.request.adapter else "")
        return SchedulerOutput(decoding, prompts)

    def keep_prefix(self, request: RunningRequest) -> None:
        """Shares a prompt that has just been computed whole."""
        if self._cache is not None and request.row is not None:
            version = request.adapter.version if request.adapter else None
            self._cache.insert(request.prefix_keys, request.row, version)

    def _reserve_decode_memory(self) -> None:
        for request in self._active():
            while request.row is not None and not self._kv.grow(request.row, request.computed + 1):
                assert len(self.running) > 1, "a single request always fits: see KvStore"
                self._preempt(self.running[-1])

    def _active(self) -> list[RunningRequest]:
        """Running requests that are computed now."""
        return self._runnable(self.running)

    def _runnable(self, requests: list[RunningRequest]) -> list[RunningRequest]:
        busy = self._busy()
        return [one for one in requests if not (busy and one.request.idle_only)]

    def _busy(self) -> bool:
        """Whether anybody is here who is not for idle steps: they sort first."""
        return any(not one.request.idle_only for one in (*self.running[:1], *self.waiting[:1]))

    def _preempt_idle(self) -> bool:
        """Whether idle requests held what a waiting one needs; then they have stepped back."""
        if not self.waiting or self.waiting[0].request.idle_only or not self.running[-1:]:
            return False
        idle = [one for one in self.running if one.request.idle_only]
        for one in idle:
            self._preempt(one)
        return bool(idle)

    def _preempt(self, request: RunningRequest) -> None:
        self.running.remove(request)
        self._release(request)
        self.add(request)
        self.preemptions += 1

    def _release(self, request: RunningRequest, *, wipe: bool = False) -> None:
        if request.row is not None:
            self._kv.free(request.row, wipe=wipe)
            request.row = None
        if request.slot is not None:
            self._slots.release(request.slot.version)
            request.slot = None

    def _admit(self, budget: "_StepBudget") -> list[ScheduledTokens]:
        """Takes requests from the queue while there are tokens, rows and memory left for them.

        A request whose next block is being computed by another one right now waits for it, and then shares it.
        """
        admitted: list[ScheduledTokens] = []
        underway = {key for request in self._active() if request.remaining > 1 for key in self._keys(request)}
        if budget.spent or len(self.running) >= self._max_batch:
            return admitted
        for request in self._admission.offers(self._runnable(self.waiting), list(self.running)):
            keys = self._keys(request)
            held = self._cache.match(keys) if self._cache else 0
            if held < len(keys) and keys[held] in underway:
                continue
            if not self._seat(request, held):
                break
            underway.update(keys)
            admitted.append(budget.work(request))
            if budget.spent or len(self.running) >= self._max_batch:
                break
        return admitted

    def _seat(self, request: RunningRequest, held: int) -> bool:
        """Gives the request a row with its cached prefix in it. False: no memory now."""
        row = self._kv.allocate(request.places + min(request.to_generate, _HEADROOM))
        if row is None:
            return False
        request.row = row
        request.slot = self._slots.acquire(request.version) if request.version is not None else None
        if request.slot is not None and request.slot.virtual_tokens is not None:
            self._kv.write_prefix(row, request.slot.virtual_tokens)
        if held * BLOCK > row.length and self._cache is not None:
            self._cache.fetch(request.prefix_keys[:held], row)
        request.cached_tokens = max(request.computed - request.virtual_tokens, 0)
        self.waiting.remove(request)
        insort(self.running, request, key=_arrival)
        self._admission.came_in(request)
        return True

    def _keys(self, request: RunningRequest) -> list[bytes]:
        return request.prefix_keys if self._cache else []


def _arrival(request: RunningRequest) -> Arrival:
    return request.arrival


def _row(request: RunningRequest) -> KvRow:
    assert request.row is not None, "a running request has a KV row"
    return request.row


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
