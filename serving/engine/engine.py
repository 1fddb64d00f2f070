"""The engine: one base model, many adapters, many requests decoded together in one thread.

Life of a request: `submit` checks it, holds its adapter's slot and queues it; the thread's next step admits it (copying
its cached prefix), computes its prompt in chunks beside the running answers, then one token a step; each token goes to
`on_event`. An adapter version is pinned at `submit`: retiring or dropping it later never changes a running answer.
"""

import gc
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graftwork.errors import ConfigError, DataError
from graftwork.serving.engine.adapter_slots import AdapterPool, AdapterSlots
from graftwork.serving.engine.adapters.format import ReadOptions, VirtualTokens
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.attention import Chunk
from graftwork.serving.engine.cpu.host_tuning import keep_few_kernels, keep_freed_memory, spare_old_objects
from graftwork.serving.engine.kv_cache import KvStore, PrefixCache
from graftwork.serving.engine.model_runner import DecodePath, Runner, path_for
from graftwork.serving.engine.request import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    SlotState,
    TokenEvent,
    check_request,
)
from graftwork.serving.engine.sampling import SampledToken, choose
from graftwork.serving.engine.scheduler import Counters, ScheduledTokens, Scheduler, SchedulerOutput
from graftwork.serving.engine.sequence import Decode, RunningRequest, ScoredContinuation
from graftwork.serving.spec import EngineSpec

_log = logging.getLogger(__name__)
_CACHE_SHARE = 4
"""One token in four of engine.kv_tokens belongs to the prefix cache, where it is on."""


class NativeEngine:
    """Decodes requests for the base and for every loaded adapter in one batch, in its own thread.

    model: a loaded transformers decoder (`AutoModelForCausalLM`) on `device`; the engine uses it alone until `stop`.
    decode: token ids to text; needed only for requests with stop strings. path: None takes the device's own.
    """

    def __init__(
        self, model: Any, spec: EngineSpec, device: str, decode: Decode | None = None, path: DecodePath | None = None
    ) -> None:
        self.spec, self._decode = spec, decode
        keep_few_kernels()
        self._path = path or path_for(torch.device(device))
        self.runner = Runner(model, device, self._path, places=0 if self._path else spec.max_loaded)
        try:
            self._kv, self._cache = _memory(self.runner, spec)
        except ConfigError:
            self.runner.close()
            raise
        if self._path is not None:
            self._path.attach(self.runner, self._kv, max_batch=spec.max_batch, max_rank=spec.max_rank)
        self.pool = AdapterPool(
            self.runner.sites.groups(),
            self.runner.base,
            ReadOptions(spec.max_rank, self.runner.dtype, narrow=self.runner.planner.reads_in_place),
            device=self.runner.device,
            stacked=self._path is not None,
            on_freed=self._tell_freed,
        )
        self._slots = AdapterSlots(spec.max_loaded, self._bring, self.runner.forget)
        self._scheduler = Scheduler(
            self._kv, self._cache, self._slots, max_batch=spec.max_batch, prefill_tokens=spec.prefill_tokens
        )
        self._counters = Counters()
        self._arrivals = itertools.count()
        self._live: dict[str, RunningRequest] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -- any thread ---------------------------------------------------------------------------------------------------

    def load_adapter(self, version: str, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads a PEFT folder into host memory and returns the bytes that it takes there.

        digests: sha256 by file name, checked. ArtifactError names the key and rule of anything that cannot be served.
        """
        return self.pool.load(version, folder, digests)

    def check_adapter(self, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """As `load_adapter`, and lets it go again."""
        return self.pool.check(folder, digests)

    def retire_adapter(self, version: str) -> None:
        """Takes no new requests for `version`; it is freed when its last request ends."""
        self.pool.retire(version)

    def adapters(self) -> list[SlotState]:
        """Loaded versions, least recently used first."""
        return self.pool.states(self._slots.versions())

    def room(self, version: str | None) -> int:
        """engine.max_seq_len, less the virtual tokens of the adapter."""
        return self.spec.max_seq_len - (self.pool.virtual_tokens(version) if version is not None else 0)

    def submit(self, request: GenerateRequest, on_event: Callable[[TokenEvent], None]) -> None:
        """Queues a request. `on_event` is called in the engine's thread and must not block.

        Raises DataError (prompt empty or too long, token id out of range, bad sampling value, id in use) or
        ArtifactError (adapter not loaded or retired) before anything is queued.
        """
        check_request(
            request,
            max_seq_len=self.spec.max_seq_len,
            vocab_size=self.runner.vocab_size,
            decodes=self._decode is not None,
        )
        adapter = self.pool.acquire(request.adapter) if request.adapter is not None else None
        if adapter is not None and adapter.virtual_tokens is not None:
            self._check_virtual_tokens(request, adapter.version, adapter.virtual_tokens)
        arrived = request.arrived if request.arrived is not None else time.perf_counter()
        arrival = (request.idle_only, arrived, next(self._arrivals))
        running = RunningRequest(arrival, request, on_event, adapter)
        with self._wake:
            if self._stopping or request.request_id in self._live:
                found = "the engine is stopped" if self._stopping else "in use"
                if request.adapter is not None:
                    self.pool.release(request.adapter)
                raise DataError(f"request_id {request.request_id!r}", found, "ids of running requests differ")
            self._live[request.request_id] = running
            self._inbox.append(lambda: self._scheduler.add(running))
            self._wake.notify()

    def _check_virtual_tokens(self, request: GenerateRequest, version: str, lead: VirtualTokens) -> None:
        """The places before the prompt count too; lets the adapter go where they do not fit."""
        answer = len(request.continuation) or request.sampling.max_new_tokens
        total, limit = lead.count + len(request.prompt_ids) + answer, self.spec.max_seq_len
        if total > limit:
            self.pool.release(version)
            found = f"{lead.count} virtual tokens of the adapter, prompt and answer: {total} together"
            move = "shorten the prompt, lower max_new_tokens or raise engine.max_seq_len"
            raise DataError(f"request {request.request_id!r}", found, f"they fit into engine.max_seq_len={limit}", move)

    def cancel(self, request_id: str) -> None:
        """Ends a request with finish_reason="cancelled" before the next step; unknown ids are ignored."""
        self._post(lambda: self._cancel(request_id))

    def start(self) -> None:
        """Starts the engine's thread; on a GPU, captures its graphs first."""
        assert self._thread is None, "an engine is started once"
        if self._path is not None:
            self._path.warm_up()
        if self.runner.device.type == "cpu":
            keep_freed_memory()
        spare_old_objects()
        self._thread = threading.Thread(target=self._serve, name="graftwork-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancels what is queued or running, ends the thread and gives the model back."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            gc.unfreeze()
        self._drain()
        for request in list(self._live.values()):
            self._end(request, "cancelled")
        self.runner.close()

    def alive(self) -> bool:
        """Whether the engine's thread runs; False before `start`, after `stop`, and should it ever have died."""
        return self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Counters since the start and the state now."""
        return self._counters.snapshot(self._scheduler, self._kv, self._cache)

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        torch.set_num_threads(self.spec.num_threads or torch.get_num_threads())
        with torch.inference_mode():
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping or self._inbox or self._live)
                    if self._stopping:
                        return
                self._drain()
                self._step()

    def _step(self) -> None:
        """One forward pass. An exception in it fails the requests that took part, not the engine."""
        started = time.perf_counter()
        involved = [*self._scheduler.running, *self._scheduler.waiting]
        try:
            plan = self._scheduler.plan()
            involved = [work.request for work in plan.works()]
            choices = self._compute(plan) if plan else {}
        except Exception as error:  # top of the thread: whatever the model raises ends these requests, and only these
            for request in involved:
                self._end(request, "error", f"{type(error).__name__}: {error}")
            return
        finishing = [work.request for work in plan.works() if work.finishes]
        for work in plan.works():
            _advance(work)
        for request in finishing:
            if request.given is not None:
                self._tell_score(request, request.given)
            else:
                self._deliver(request, choices[request])
        self._counters.steps += bool(plan)
        mixed = len({work.request.request.adapter for work in plan.works()} - {None})
        self._counters.most_adapters_in_step = max(self._counters.most_adapters_in_step, mixed)
        self._counters.step(time.perf_counter() - started)

    def _compute(self, plan: SchedulerOutput) -> dict[RunningRequest, SampledToken]:
        """Runs the plan, chooses a token for every request that is ready for one, and scores given continuations."""
        works = list(plan.works())
        decoding, prompts = ([_chunk(work) for work in half] for half in (plan.decoding, plan.prompts))
        firsts = itertools.accumulate((work.count for work in works), initial=0)
        wanted = [first + place for work, first in zip(works, firsts, strict=False) for place in work.wanted]
        adapters = [work.request.slot for work in plan.decoding], [work.request.slot for work in plan.prompts]
        logits_NV = self.runner.step(self._kv, decoding, prompts, adapters, wanted)
        choosing = [work.request for work in works if work.finishes and work.request.given is None]
        if len(choosing) < len(wanted):
            logits_NV = _score(works, logits_NV)
        if not choosing:
            return {}
        return dict(zip(choosing, choose(logits_NV, [one.choosing for one in choosing]), strict=True))

    def _deliver(self, running: RunningRequest, choice: SampledToken) -> None:
        """Hands one token out, and ends the request where it is the last."""
        if choice.error is not None:
            self._end(running, "error", choice.error)
            return
        first = len(running.tokens) == len(running.request.prompt_ids)
        if first:
            self._keep_prompt(running)
        self._counters.generated_tokens += 1
        reason = running.append(choice.token_id, self._decode)
        if reason is not None:
            self._release(running, reason)
        cached = running.cached_tokens if first else 0
        event = TokenEvent(
            running.request.request_id, choice.token_id, choice.logprob, reason, cached_tokens=cached, top=choice.top
        )
        if not self._emit(running, event) and reason is None:
            self._release(running, "error")

    def _tell_score(self, running: RunningRequest, given: ScoredContinuation) -> None:
        if not math.isfinite(given.total):
            self._end(running, "error", "the model's logits are not finite")
            return
        self._keep_prompt(running)
        self._release(running, "scored")
        name, cached = running.request.request_id, running.cached_tokens
        self._emit(running, TokenEvent(name, -1, given.total, "scored", cached_tokens=cached))

    def _keep_prompt(self, running: RunningRequest) -> None:
        """Shares a prompt that has just been computed, and counts it."""
        self._scheduler.keep_prefix(running)
        self._counters.prompt_tokens += len(running.request.prompt_ids)
        self._counters.prompt_tokens_from_cache += running.cached_tokens

    def _end(self, running: RunningRequest, reason: FinishReason, error: str | None = None) -> None:
        """Ends a request without a token."""
        self._release(running, reason)
        self._emit(running, TokenEvent(running.request.request_id, -1, None, reason, error))

    def _release(self, running: RunningRequest, reason: FinishReason) -> None:
        """Gives back what the request holds. After an error its KV is cleared: it may hold inf or nan."""
        self._scheduler.remove(running, wipe=reason == "error")
        with self._wake:
            del self._live[running.request.request_id]
        if running.adapter is not None:
            self.pool.release(running.adapter.version)
        self._counters.finished[reason] += 1

    def _emit(self, running: RunningRequest, event: TokenEvent) -> bool:
        """Calls the request's own function; False where that raised, which is that request's fault alone."""
        try:
            running.on_event(event)
        except Exception:  # foreign code at the top of this thread
            _log.exception("on_event of request %s raised; the request ends", running.request.request_id)
            return False
        return True

    def _cancel(self, request_id: str) -> None:
        running = self._live.get(request_id)
        if running is not None:
            self._end(running, "cancelled")

    def _bring(self, version: str) -> LoadedAdapter:
        move = partial(self.pool.copy_to_device, version, self.runner.device)
        weights = move() if self._path is None else self._path.bring(move)
        if weights.groups:
            self.runner.planner.admit(weights)
        return weights

    def _tell_freed(self, version: str) -> None:
        self._post(lambda: self._forget(version))

    def _forget(self, version: str) -> None:
        self._slots.empty(version)
        if self._cache is not None:
            self._cache.drop(version)

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()


def _memory(runner: Runner, spec: EngineSpec) -> tuple[KvStore, PrefixCache | None]:
    """Key-value memory of the rows and of the prefix cache, together engine.kv_tokens."""
    if runner.max_positions is not None and spec.max_seq_len > runner.max_positions:
        raise ConfigError("engine.max_seq_len", str(spec.max_seq_len), runner.position_rule, "lower engine.max_seq_len")
    cache_tokens = spec.kv_tokens // _CACHE_SHARE if spec.prefix_cache else 0
    kv = runner.new_kv(spec.kv_tokens - cache_tokens, spec.max_seq_len)
    return kv, PrefixCache(kv, cache_tokens) if spec.prefix_cache else None


def _chunk(work: ScheduledTokens) -> Chunk:
    request, start = work.request, work.request.computed
    return Chunk(request.ids(start, work.count), start, request.row)


def _score(works: Sequence[ScheduledTokens], logits_NV: torch.Tensor) -> torch.Tensor:
    """Reads off what was asked about given continuations; the logits of the other requests remain."""
    left, first = [], 0
    for work in works:
        logits = logits_NV[first : first + len(work.wanted)]
        first += len(work.wanted)
        if work.request.given is None:
            left.append(logits)
        elif len(logits):
            work.request.given.take(work.scored, logits)
    return torch.cat(left) if left else logits_NV[:0]


def _advance(work: ScheduledTokens) -> None:
    assert work.request.row is not None, "a running request has a KV row"
    work.request.row.length += work.count
