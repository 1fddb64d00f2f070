"""The engine: one base model, many adapters, many requests decoded together in one thread.

Life of a request: `submit` checks it, holds its adapter's slot and queues it; the thread's next step admits it (copying
its cached prefix), computes its prompt in chunks next to the running answers, then one token a step; each token goes to
`on_event`. An adapter version is pinned at `submit`: retiring or dropping it later never changes a running answer.
"""

import gc
import itertools
import logging
import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.errors import ConfigError, DataError
from graftwork.serving.engine.adapter_slots import AdapterPool, AdapterSlots
from graftwork.serving.engine.adapters.format import ReadOptions, VirtualTokens
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.attention import Chunk
from graftwork.serving.engine.cpu.host_tuning import keep_few_kernels, keep_freed_memory, spare_old_objects
from graftwork.serving.engine.kv_cache import KvStore, PrefixCache, block_keys
from graftwork.serving.engine.model_runner import Runner, most_packed
from graftwork.serving.engine.request import (
    STEP_S,
    EngineStats,
    FinishReason,
    GenerateRequest,
    SlotState,
    TokenEvent,
    check_request,
)
from graftwork.serving.engine.sampling import SampledToken, choose
from graftwork.serving.engine.scheduler import Decode, RunningRequest, Scheduler, ScoredContinuation
from graftwork.serving.spec import EngineSpec

if TYPE_CHECKING:
    from graftwork.serving.engine.cuda.graph_decode import GraphDecode  # imports Triton

_log = logging.getLogger(__name__)
_PREFIX_CACHE_DIVISOR = 4
"""One token in four of engine.kv_tokens belongs to the prefix cache, where it is on."""


class NativeEngine:
    """Decodes requests for the base and for every loaded adapter in one batch, in its own thread.

    model: a loaded transformers decoder (`AutoModelForCausalLM`) on `device`; the engine uses it alone until `stop`.
    decode: token ids to text; needed only for requests with stop strings. graph_decode: decodes on a GPU; made if None.
    """

    def __init__(
        self,
        model: Any,
        spec: EngineSpec,
        device: str,
        decode: Decode | None = None,
        graph_decode: "GraphDecode | None" = None,
    ) -> None:
        self.spec, self._decode = spec, decode
        keep_few_kernels()
        if graph_decode is None and torch.device(device).type == "cuda":
            from graftwork.serving.engine.cuda.graph_decode import GraphDecode  # Triton: on CUDA alone

            graph_decode = GraphDecode(torch.device(device))
        self._graph_decode = graph_decode
        self.runner = Runner(model, device, graph_decode, places=0 if graph_decode else spec.max_loaded)
        try:
            _check_packed(self.runner, spec)
            self._kv, self._cache = _allocate_kv(self.runner, spec)
        except ConfigError:
            self.runner.close()
            raise
        if self._graph_decode is not None:
            self._graph_decode.attach(self.runner, self._kv, max_batch=spec.max_batch, max_rank=spec.max_rank)
        self.pool = AdapterPool(
            self.runner.sites.groups(),
            self.runner.base,
            ReadOptions(spec.max_rank, self.runner.dtype, narrow=self.runner.planner.reads_in_place),
            device=self.runner.device,
            stacked=self._graph_decode is not None,
            on_freed=lambda version: self._post(partial(self._forget, version)),
        )
        self._slots = AdapterSlots(spec.max_loaded, self._copy_adapter_to_device, self.runner.forget)
        self._scheduler = Scheduler(
            self._kv, self._cache, self._slots, max_batch=spec.max_batch, prefill_tokens=spec.prefill_tokens
        )
        self._counts = EngineStats()
        """Counters alone. Other threads read them; each is right by itself."""
        self._arrivals = itertools.count()
        self._live: dict[str, RunningRequest] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._spared = False

    # -- any thread ---------------------------------------------------------------------------------------------------

    def load_adapter(self, version: str, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads a PEFT folder into host memory and returns the bytes that it takes there.

        digests: sha256 by file name, checked. ArtifactError names the key and rule of anything that cannot be served.
        """
        return self.pool.load(version, folder, digests)

    def check_adapter(self, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads a PEFT folder as `load_adapter` does, without keeping it."""
        return self.pool.check(folder, digests)

    def retire_adapter(self, version: str) -> None:
        """Takes no new requests for `version`; it is freed when its last request ends."""
        self.pool.retire(version)

    def adapters(self) -> list[SlotState]:
        """Loaded versions, least recently used first."""
        return self.pool.states(self._slots.versions())

    def max_request_tokens(self, version: str | None) -> int:
        """engine.max_seq_len, less the virtual tokens of the adapter."""
        return self.spec.max_seq_len - (self.pool.virtual_tokens(version) if version is not None else 0)

    def submit(self, request: GenerateRequest, on_event: Callable[[TokenEvent], None]) -> None:
        """Queues a request. `on_event` is called in the engine's thread, or in that of `stop`, and must not block.

        Raises DataError (prompt empty or too long, token id out of range, bad sampling value, id in use, engine
        stopped) or ArtifactError (adapter not loaded or retired) before anything is queued.
        """
        check_request(
            request,
            max_seq_len=self.spec.max_seq_len,
            vocab_size=self.runner.vocab_size,
            decodes=self._decode is not None,
        )
        adapter = self.pool.acquire(request.adapter) if request.adapter is not None else None
        try:
            self._enqueue(self._new_running(request, on_event, adapter))
        except BaseException:  # Ctrl-C as well: the adapter could never be freed
            if adapter is not None:
                self.pool.release(adapter.version)
            raise

    def _new_running(
        self, request: GenerateRequest, on_event: Callable[[TokenEvent], None], adapter: LoadedAdapter | None
    ) -> RunningRequest:
        if adapter is not None and adapter.virtual_tokens is not None:
            self._check_virtual_tokens(request, adapter.virtual_tokens)
        arrived = request.arrived if request.arrived is not None else time.perf_counter()
        arrival = (request.background, arrived, next(self._arrivals))
        running = RunningRequest(arrival, request, on_event, adapter)
        if self._cache is not None:
            prefix = running.tokens[: running.prompt_end - 1]
            running.prefix_keys = block_keys(request.adapter, prefix, request.cache_salt)
        return running

    def _enqueue(self, running: RunningRequest) -> None:
        name = running.request.request_id
        with self._wake:
            if self._stopping:
                raise DataError(f"request {name!r}", "the engine is stopped", "a stopped engine takes no requests")
            if name in self._live:
                raise DataError(f"request_id {name!r}", "in use", "ids of running requests differ")
            self._live[name] = running
            self._inbox.append(partial(self._scheduler.add, running))
            self._wake.notify()

    def _check_virtual_tokens(self, request: GenerateRequest, lead: VirtualTokens) -> None:
        """Raises DataError where virtual tokens, prompt and answer together are too long."""
        answer = len(request.continuation) or request.sampling.max_new_tokens
        total, limit = lead.count + len(request.prompt_ids) + answer, self.spec.max_seq_len
        if total > limit:
            found = f"{lead.count} virtual tokens of the adapter, prompt and answer: {total} together"
            hint = "shorten the prompt, lower max_new_tokens or raise engine.max_seq_len"
            raise DataError(f"request {request.request_id!r}", found, f"they fit into engine.max_seq_len={limit}", hint)

    def cancel(self, request_id: str) -> None:
        """Ends a request with finish_reason="cancelled" before the next step; unknown ids are ignored."""
        self._post(partial(self._cancel, request_id))

    def start(self) -> None:
        """Starts the engine's thread; on a GPU, captures its graphs first."""
        assert self._thread is None, "an engine is started once"
        if self._graph_decode is not None:
            self._graph_decode.warm_up()
        if self.runner.device.type == "cpu":
            keep_freed_memory()
        self._spared = spare_old_objects()
        self._thread = threading.Thread(target=self._serve, name="graftwork-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancels what is queued or running, ends the thread and gives the model back. A second call does nothing.

        Blocks until the step under way has ended. `on_event` of the cancelled requests is called in the caller's
        thread: the engine's own has ended by then, or was never started.
        """
        with self._wake:
            if self._stopping:
                return
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            if self._spared:
                gc.unfreeze()
        while self._inbox:
            self._inbox.popleft()()
        for request in list(self._live.values()):
            self._end(request, "cancelled")
        self.runner.close()

    def alive(self) -> bool:
        """Return True while the engine's thread runs: not before `start`, after `stop`, or once it has died."""
        return self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Counters since the start and the state now."""
        return replace(
            self._counts,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_tokens_used=self._kv.used_tokens,
            kv_tokens_limit=self._kv.capacity,
            prefix_tokens_cached=self._cache.tokens if self._cache else 0,
            preemptions=self._scheduler.preemptions,
            finished=dict(self._counts.finished),
        )

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        torch.set_num_threads(self.spec.num_threads or torch.get_num_threads())
        with torch.inference_mode():
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping or self._inbox or self._live)
                    if self._stopping:
                        return
                while self._inbox:
                    self._inbox.popleft()()
                self._step()

    def _step(self) -> None:
        """One forward pass. An exception in it fails the requests that took part, not the engine.

        An exception in the delivery of a token (`_deliver`) fails the request of that token alone.
        """
        started = time.perf_counter()
        involved = [*self._scheduler.running, *self._scheduler.waiting]
        try:
            decoding, prompts = self._scheduler.schedule()
            involved = [*decoding, *prompts]
            choices = self._compute(decoding, prompts) if involved else {}
        except Exception as error:  # top of the thread: whatever the model raises ends these requests, and only these
            for request in involved:
                self._end(request, "error", f"{type(error).__name__}: {error}")
            return
        for request in involved:
            assert request.row is not None, "a running request has a KV row"
            request.row.length += request.scheduled
        for request, choice in choices.items():
            self._deliver(request, choice)
        counts, adapters = self._counts, {request.version for request in involved} - {None}
        counts.steps += bool(involved)
        counts.most_adapters_in_step = max(counts.most_adapters_in_step, len(adapters))
        seconds = time.perf_counter() - started
        bucket, times = bisect_left(STEP_S, seconds), counts.step_times
        counts.step_s += seconds
        counts.step_times = (*times[:bucket], times[bucket] + 1, *times[bucket + 1 :])

    def _compute(
        self, decoding: Sequence[RunningRequest], prompts: Sequence[RunningRequest]
    ) -> dict[RunningRequest, SampledToken]:
        """Runs the plan; returns the next token, or the score of a continuation, of requests that are ready for it."""
        requests = (*decoding, *prompts)
        chunks: list[Chunk] = []
        counts: list[int] = []  # logits that each request needs: of the last tokens of its chunk
        wanted: list[int] = []
        end = 0
        for one in requests:
            start = one.row.length if one.row is not None else 0
            chunks.append(Chunk(one.tokens[start : start + one.scheduled], start, one.row))
            count = len(one.scored) if one.scoring is not None else int(one.scheduled == one.remaining)
            end += one.scheduled
            wanted += range(end - count, end)
            counts.append(count)
        adapters = [one.slot for one in decoding], [one.slot for one in prompts]
        split = len(decoding)
        logits_NV = self.runner.step(self._kv, chunks[:split], chunks[split:], adapters, wanted)
        if any(count for one, count in zip(requests, counts, strict=True) if one.scoring is not None):
            logits_NV = _take_scores(requests, logits_NV.split(counts))
        ready = [one for one in requests if one.scheduled == one.remaining]
        samplers = [one.sampler for one in ready if one.scoring is None]
        tokens = iter(choose(logits_NV, samplers) if samplers else ())
        return {one: next(tokens) if one.scoring is None else _total_score(one.scoring) for one in ready}

    def _deliver(self, running: RunningRequest, choice: SampledToken) -> None:
        """Hands one token or score out, and ends the request where it is the last or an exception keeps it back."""
        if choice.error is not None:
            self._end(running, "error", choice.error)
            return
        try:
            event = self._record(running, choice)
        except Exception as error:  # top of the thread: the tokenizer, the grammar or a copy into the prefix cache
            _log.exception("token of request %s cannot be delivered; the request ends", running.request.request_id)
            self._end(running, "error", f"{type(error).__name__}: {error}")
            return
        if event.finish_reason is not None:
            self._release(running, event.finish_reason)
        if not self._emit(running, event) and event.finish_reason is None:
            self._release(running, "error")

    def _record(self, running: RunningRequest, choice: SampledToken) -> TokenEvent:
        """Adds the token to its request, and the prompt computed just now to the prefix cache; returns the event."""
        cached = 0
        if running.scoring is not None or len(running.tokens) == running.prompt_end:  # its prompt was computed just now
            if self._cache is not None and running.row is not None:
                self._cache.insert(running.prefix_keys, running.row, running.version)
            cached = running.cached_tokens
            self._counts.prompt_tokens += len(running.request.prompt_ids)
            self._counts.prompt_tokens_from_cache += cached
        reason: FinishReason | None = "scored"
        if running.scoring is None:
            self._counts.generated_tokens += 1
            reason = running.append(choice.token_id, self._decode)
        name = running.request.request_id
        return TokenEvent(name, choice.token_id, choice.logprob, reason, cached_tokens=cached, top=choice.top)

    def _end(self, running: RunningRequest, reason: FinishReason, error: str | None = None) -> None:
        """Ends a request without a token."""
        self._release(running, reason)
        self._emit(running, TokenEvent(running.request.request_id, -1, None, reason, error))

    def _release(self, running: RunningRequest, reason: FinishReason) -> None:
        """Gives back what the request holds. After an error its KV is cleared: it may hold inf or nan."""
        self._scheduler.remove(running, wipe=reason == "error")
        with self._wake:
            del self._live[running.request.request_id]
        if running.version is not None:
            self.pool.release(running.version)
        self._counts.finished[reason] = self._counts.finished.get(reason, 0) + 1

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

    def _copy_adapter_to_device(self, version: str) -> LoadedAdapter:
        copy = partial(self.pool.copy_to_device, version, self.runner.device)
        weights = copy() if self._graph_decode is None else self._graph_decode.copy_adapter(copy)
        if weights.groups:
            self.runner.planner.admit(weights)
        return weights

    def _forget(self, version: str) -> None:
        self._slots.empty(version)
        if self._cache is not None:
            self._cache.drop(version)

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()


def _check_packed(runner: Runner, spec: EngineSpec) -> None:
    most, limit = spec.max_batch + spec.prefill_tokens, most_packed(runner.config)
    if limit is not None and most > limit:
        found, rule = f"passes of up to {most} tokens", f"this base computes at most {limit} in one pass"
        raise ConfigError("engine.prefill_tokens", found, rule, f"set it to {limit - spec.max_batch} or less")


def _allocate_kv(runner: Runner, spec: EngineSpec) -> tuple[KvStore, PrefixCache | None]:
    """Key-value memory of the rows and of the prefix cache, together engine.kv_tokens."""
    if runner.max_positions is not None and spec.max_seq_len > runner.max_positions:
        raise ConfigError("engine.max_seq_len", str(spec.max_seq_len), runner.position_rule, "lower engine.max_seq_len")
    cache_tokens = spec.kv_tokens // _PREFIX_CACHE_DIVISOR if spec.prefix_cache else 0
    kv = runner.new_kv(spec.kv_tokens - cache_tokens, spec.max_seq_len)
    return kv, PrefixCache(kv, cache_tokens) if spec.prefix_cache else None


def _take_scores(requests: Sequence[RunningRequest], logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Record the scores of given continuations; returns the logits of the other requests."""
    left = []
    for one, logits_NV in zip(requests, logits, strict=True):
        if one.scoring is None:
            left.append(logits_NV)
        elif len(logits_NV):
            one.scoring.take(one.scored, logits_NV)
    return torch.cat(left) if left else logits[0][:0]


def _total_score(scoring: ScoredContinuation) -> SampledToken:
    error = None if math.isfinite(scoring.total) else "the model's logits are not finite"
    return SampledToken(-1, scoring.total, error=error)
