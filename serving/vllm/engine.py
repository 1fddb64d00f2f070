"""`Engine` over vLLM's AsyncLLM: an event loop in a thread of its own, and one task on it for each request.

Life of a request: `submit` checks it, pins its adapter version and starts its task; the task reads vLLM's deltas and
emits them as events; when it has ended, the version is released and the last event is sent. vLLM serves in order of
arrival here, which is that of `submit` (`GenerateRequest.arrived` cannot be honoured). vLLM 0.29.0 calls its stat
loggers on its event loop, where our own counts are taken too.
"""

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

from graftwork.base.load import ResolvedBase
from graftwork.errors import ArtifactError, BaseModelError, ConfigError, DataError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.request import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    SlotState,
    TokenEvent,
    check_request,
)
from graftwork.serving.spec import EngineSpec
from graftwork.serving.vllm.translate import (
    LoadedLora,
    Loras,
    Translator,
    VllmOutput,
    check_adapter,
    engine_arguments,
    grammar_arguments,
    sampling_arguments,
)


@dataclass
class Tally:
    """Counts of one engine. Written on the engine's event loop, read from any thread."""

    kv_tokens_limit: int
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    preemptions: int = 0
    most_adapters: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """vLLM's SchedulerStats and IterationStats of a step; either may be None."""
        if scheduler_stats is not None:
            self.running, self.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            self.most_adapters = max(self.most_adapters, len(scheduler_stats.running_lora_adapters))
        if iteration_stats is not None:
            self.steps += 1
            self.preemptions += iteration_stats.num_preempted_reqs

    def token(self, event: TokenEvent, prompt_tokens: int, *, first: bool) -> None:
        """A token was handed out, or a continuation scored."""
        self.generated += event.token_id >= 0
        if first:
            self.prompt_tokens += prompt_tokens
            self.cached_tokens += event.cached_tokens

    def stats(self, live: int) -> EngineStats:
        """As `Engine.stats`. live: requests that have not ended; vLLM's own view lags by a step."""
        return EngineStats(
            running=min(self.running, live),
            waiting=max(live - min(self.running, live), 0),
            kv_tokens_used=round(self.kv_usage * self.kv_tokens_limit) if live else 0,
            kv_tokens_limit=self.kv_tokens_limit,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_from_cache=self.cached_tokens,
            generated_tokens=self.generated,
            finished={reason: count for reason, count in self.finished.items() if count},
            preemptions=self.preemptions,
            most_adapters_in_step=self.most_adapters,
        )


T = TypeVar("T")
OnEvent = Callable[[TokenEvent], None]
_log = logging.getLogger(__name__)


class AsyncLlm(Protocol):
    """The part of `vllm.v1.engine.async_llm.AsyncLLM` (0.29.0) that is used, all of it on one event loop."""

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[VllmOutput, None]:
        """Outputs of one request; closing or cancelling it aborts the request."""

    async def add_lora(self, lora_request: Any) -> bool: ...
    async def remove_lora(self, lora_id: int) -> bool: ...
    def shutdown(self) -> None: ...
    @property
    def errored(self) -> bool: ...


class Translation(Protocol):
    """Makes vLLM's own objects of our plain data."""

    def prompt(self, ids: tuple[int, ...], cache_salt: str) -> Any:
        """`vllm.TokensPrompt`"""

    def sampling(self, arguments: dict[str, Any], grammar: dict[str, str] | None) -> Any:
        """`vllm.SamplingParams` with deltas as output"""

    def lora(self, lora: LoadedLora) -> Any:
        """`vllm.lora.request.LoRARequest`"""


@dataclass(eq=False)
class _Running:
    request: GenerateRequest
    on_event: OnEvent
    lora: LoadedLora | None
    sampling: Any
    translator: Translator
    task: asyncio.Task[None] | None = None
    begun: bool = False
    cancelled: bool = False
    counted: bool = False


class VllmEngine:
    """make: an AsyncLLM, called on the engine's loop; what it raises leaves the constructor. Takes minutes."""

    def __init__(
        self, make: Callable[[], AsyncLlm], words: Translation, spec: EngineSpec, *, vocab_size: int, tally: Tally
    ) -> None:
        self.spec, self._words, self._vocab_size, self._tally = spec, words, vocab_size, tally
        self._loras = Loras()
        self._one_load = threading.Lock()
        self._lock = threading.Lock()
        self._live: dict[str, _Running] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._started = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()
        try:
            self._llm = self._on_loop(_call(make))
        except BaseException:  # Ctrl-C as well: it goes on, but the loop's thread ends here
            self._end_loop()
            raise

    # -- any thread ---------------------------------------------------------------------------------------------------

    def load_adapter(self, version: str, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Reads a PEFT folder into vLLM's host cache under a fresh id, and returns the bytes of its weights.

        ArtifactError names the key of anything that vLLM would misread.
        """
        with self._one_load:
            found = self._loras.revive(version)
            if found is None:
                checked = check_adapter(folder, digests, max_rank=self.spec.max_rank)
                found = self._loras.new(version, folder, checked.rank, checked.size_bytes)
                self._on_loop(self._add(found))
                self._loras.add(found)
            return found.size_bytes

    def check_adapter(self, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Refuse an adapter that vLLM would misread, without loading anything."""
        return check_adapter(folder, digests, max_rank=self.spec.max_rank).size_bytes

    def retire_adapter(self, version: str) -> None:
        """Takes no new requests for `version`; vLLM lets it go when its last request ends."""
        self._remove_soon(self._loras.retire(version))

    def adapters(self) -> list[SlotState]:
        """Loaded versions, least recently used first."""
        return self._loras.states()

    def max_request_tokens(self, version: str | None) -> int:
        """engine.max_seq_len: no adapter that vLLM serves has virtual tokens."""
        return self.spec.max_seq_len

    def submit(self, request: GenerateRequest, on_event: OnEvent) -> None:
        """Queues a request. `on_event` is called in the engine's thread and must not block.

        Raises DataError, SamplingError (what vLLM does otherwise than our engine included) or ArtifactError before
        anything is queued.
        """
        check_request(request, max_seq_len=self.spec.max_seq_len, vocab_size=self._vocab_size, decodes=True)
        if request.continuation:
            self._check_scored(request)
        sampling = self._words.sampling(sampling_arguments(request), grammar_arguments(request))
        with self._lock:
            name = request.request_id
            if self._stopping:
                raise DataError(f"request {name!r}", "the engine is stopped", "a stopped engine takes no requests")
            if name in self._live:
                raise DataError(f"request_id {name!r}", "in use", "ids of running requests differ")
            lora = self._loras.acquire(request.adapter) if request.adapter is not None else None
            translator = Translator(request.request_id, request.sampling.logprobs or 0, request.continuation)
            running = _Running(request, on_event, lora, sampling, translator)
            self._live[request.request_id] = running
            self._loop.call_soon_threadsafe(self._begin, running)

    def _check_scored(self, request: GenerateRequest) -> None:
        total, limit = len(request.prompt_ids) + len(request.continuation), self.spec.max_seq_len
        if total >= limit:
            rule = f"with engine.kind=vllm they are fewer than engine.max_seq_len={limit}"
            found, move = f"{total} tokens of prompt and continuation", "shorten one of them or raise it"
            raise DataError(f"request {request.request_id!r}", found, rule, move)

    def cancel(self, request_id: str) -> None:
        """Ends a request with finish_reason="cancelled"; unknown ids are ignored."""
        with self._lock:
            if not self._stopping:
                self._loop.call_soon_threadsafe(self._cancel, request_id)

    def start(self) -> None:
        """Lets the requests through to vLLM."""

        async def let_through() -> None:
            self._started.set()

        self._on_loop(let_through())

    def stop(self) -> None:
        """Cancels what is queued or running and ends vLLM's processes. A second call does nothing."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._on_loop(self._stop())
        self._end_loop()

    def alive(self) -> bool:
        """Return True while vLLM decodes: False before `start`, after `stop`, and once vLLM's engine has died."""
        return self._started.is_set() and not self._stopping and not self._llm.errored

    def stats(self) -> EngineStats:
        """Our own counts of requests and tokens; key-value memory and queue as vLLM last reported them."""
        return self._tally.stats(len(self._live))

    # -- the engine's event loop --------------------------------------------------------------------------------------

    def _begin(self, running: _Running) -> None:
        running.task = self._loop.create_task(self._run(running))

    async def _run(self, running: _Running) -> None:
        """The top of one request: whatever vLLM raises ends this request, and only this one."""
        name = running.request.request_id
        running.begun = True
        try:
            last = None if running.cancelled else await self._outputs(running)
        except asyncio.CancelledError:
            last = None
        except Exception as error:  # vLLM's own errors have no base class; ours end the request just so
            _log.exception("request %s failed", name)
            last = TokenEvent(name, -1, None, "error", f"{type(error).__name__}: {error}")
        self._finish(running, last or TokenEvent(name, -1, None, "cancelled"))

    async def _outputs(self, running: _Running) -> TokenEvent:
        """Hands out all events but the last, and returns that."""
        await self._started.wait()
        request = running.request
        lora = self._words.lora(running.lora) if running.lora is not None else None
        prompt = self._words.prompt(request.prompt_ids + request.continuation, request.cache_salt)
        outputs = self._llm.generate(prompt, running.sampling, request.request_id, lora_request=lora)
        last = TokenEvent(request.request_id, -1, None, "error", "vLLM ended it without a reason")
        async with aclosing(outputs):
            async for output in outputs:  # to its end: closing it before would abort what has finished
                for event in running.translator.events(output):
                    self._count(running, event)
                    if event.finish_reason is None:
                        running.on_event(event)
                    else:
                        last = event
        return last

    def _count(self, running: _Running, event: TokenEvent) -> None:
        if event.token_id >= 0 or event.finish_reason == "scored":
            self._tally.token(event, len(running.request.prompt_ids), first=not running.counted)
            running.counted = True

    def _finish(self, running: _Running, last: TokenEvent) -> None:
        """Release what the request holds, then send its last event."""
        with self._lock:
            del self._live[running.request.request_id]
        if running.lora is not None:
            self._remove_soon(self._loras.release(running.lora))
        reason: FinishReason = last.finish_reason or "error"
        self._tally.finished[reason] += 1
        try:
            running.on_event(last)
        except Exception:  # foreign code at the top of this thread
            _log.exception("on_event of request %s raised", running.request.request_id)

    def _cancel(self, request_id: str) -> None:
        running = self._live.get(request_id)
        if running is None or running.cancelled:
            return
        running.cancelled = True  # a second cancel would break off vLLM's own abort
        if running.begun and running.task is not None:  # else `_run` sees the mark
            running.task.cancel()

    async def _add(self, lora: LoadedLora) -> None:
        try:
            added = await self._llm.add_lora(self._words.lora(lora))
        except Exception as error:  # vLLM's worker sends its failure as a plain Exception
            rule = "vLLM loads every adapter that it serves"
            raise ArtifactError(f"adapter {lora.version}", str(error)[:400], rule) from error
        if not added:
            raise ArtifactError(f"adapter {lora.version}", "vLLM did not load it", "its log says why")

    def _remove_soon(self, lora: LoadedLora | None) -> None:
        with self._lock:
            if lora is not None and not self._stopping:
                self._loop.call_soon_threadsafe(self._remove, lora)

    def _remove(self, lora: LoadedLora) -> None:
        task = self._loop.create_task(self._remove_from_vllm(lora))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _remove_from_vllm(self, lora: LoadedLora) -> None:
        try:
            await self._llm.remove_lora(lora.number)
        except Exception:  # vLLM's worker sends its failure as a plain Exception; the id is never used again
            _log.exception("vLLM could not let adapter %s go", lora.name)

    async def _stop(self) -> None:
        for name in list(self._live):
            self._cancel(name)
        while self._live:
            await asyncio.wait([running.task for running in self._live.values() if running.task is not None])
        self._llm.shutdown()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _call(make: Callable[[], AsyncLlm]) -> AsyncLlm:
    return make()


ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # vLLM would report this machine to its makers
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a replica has threads and may have touched CUDA
}


def create_vllm(base: ResolvedBase, quant: QuantSpec, spec: EngineSpec) -> VllmEngine:
    """A vLLM engine on this process' GPUs. Blocks for minutes.

    Raises ConfigError (vLLM or its bitsandbytes plugin is not installed, a setting that vLLM cannot honour),
    BaseModelError (vLLM cannot load the base).
    """
    arguments = engine_arguments(base.folder, spec, quant)
    if base.overrides:
        arguments["hf_overrides"] = dict(base.overrides)
    _require("vllm")
    if quant.is_packed:
        _require("vllm_bnb_plugin")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    tally = Tally(spec.kv_tokens)

    def make() -> AsyncLlm:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        llm: AsyncLlm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[_stat_logger(tally)])
        return llm

    try:
        return VllmEngine(make, VllmTranslation(), spec, vocab_size=int(base.config["vocab_size"]), tally=tally)
    except (RuntimeError, ValueError, OSError, ImportError, NotImplementedError) as error:
        raise BaseModelError(
            f"base {base.uri} with engine.kind=vllm",
            f"vLLM did not start ({str(error)[:400]})",
            "vLLM needs CUDA devices, and an architecture that it knows",
            "see its log, or use engine.kind=graftwork",
        ) from error


class VllmTranslation:
    """vLLM's own classes."""

    def prompt(self, ids: tuple[int, ...], cache_salt: str) -> Any:
        """Token ids in; vLLM takes no empty salt."""
        from vllm import TokensPrompt

        salted = {"cache_salt": cache_salt} if cache_salt else {}
        return TokensPrompt(prompt_token_ids=list(ids), **salted)

    def sampling(self, arguments: dict[str, Any], grammar: dict[str, str] | None) -> Any:
        """Deltas out."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        structured = StructuredOutputsParams(**grammar) if grammar is not None else None
        return SamplingParams(**arguments, structured_outputs=structured, output_kind=RequestOutputKind.DELTA)

    def lora(self, lora: LoadedLora) -> Any:
        """Never with `load_inplace`."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name=lora.name, lora_int_id=lora.number, lora_path=str(lora.folder))


def _stat_logger(tally: Tally) -> Any:
    """A factory of vLLM's stat loggers that write into the tally."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class ToTally(StatLoggerBase):  # type: ignore[misc]  # vLLM has no types here
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            tally.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    return ToTally


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            "engine.kind=vllm",
            f"the package {package} is not installed where the engine runs",
            "vLLM is the extra `vllm`, for Linux with CUDA",
            "pip install 'vllm==0.29.0' 'vllm-bnb-plugin>=0.0.3,<0.1'",
        )
