"""Engine replica of Ray Serve: one engine over one base, and the adapters that its requests need."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from graftwork.base import load
from graftwork.errors import GraftworkError, RunError, StorageError
from graftwork.prompts.render import Passage
from graftwork.prompts.template import Template
from graftwork.serving.adapter_cache import AdapterCache, Pin
from graftwork.serving.api.errors import ApiError, as_api_errors, bad_request, to_api_error
from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.arms import ArmPrompt, build_prompt, find, query_of, require_bytes, size_of, warm
from graftwork.serving.detokenize import LogprobStream, StreamedAnswer, TextStream, engine_failure, generate
from graftwork.serving.engine import open_engine
from graftwork.serving.engine.grammar import Grammar, Grammars, Vocabulary, read_grammar
from graftwork.serving.engine.request import GenerateRequest, choice_seed
from graftwork.serving.live_config import read_live_record
from graftwork.serving.messages import ArmAnswer, ArmRequest, Likelihood, Question, StreamChunk, StreamStart
from graftwork.serving.metrics_export import ReplicaMetrics, ReplicaSnapshot
from graftwork.serving.models import VERBS, AdapterSource, Registry, as_served, trained_prompt
from graftwork.serving.rag.rerank import rerank
from graftwork.serving.ray_serve_lifecycle import end_with
from graftwork.serving.router import RESIDENTS
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import Store

log = logging.getLogger("ray.serve")
PROMPT_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A request whose version is pinned and whose prompt is built. Closing `hold` releases the pin."""

    prompt: ArmPrompt
    grammar: Grammar | None
    pin: Pin | None
    version: str | None
    """The adapter version; None is the base."""
    hold: ExitStack


class EngineReplica:
    """Answers arms. All methods run on the replica's event loop; decoding runs in the engine's own thread."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, spec: Json, owner: str | None = None, follows: bool = False
    ) -> None:
        """owner, follows: see `graftwork.serving.deploy.build`."""
        self._spec, self._name = ServeSpec.model_validate(spec), _replica_name()
        self._loop, self._threads = asyncio.get_running_loop(), ThreadPoolExecutor(PROMPT_THREADS, "prompt")
        base = await self._loop.run_in_executor(self._threads, load.resolve, self._spec.base)
        self._base_digest = base.digest
        self._source = AdapterSource(Store(self._spec.root), base.digest)
        self._template = await self._loop.run_in_executor(self._threads, load.template, base)
        opened = self._loop.run_in_executor(self._threads, open_engine, self._spec, base, self._template)
        self._engine, self._reason = await opened
        self._vocabulary = Vocabulary(self._template, int(base.config.get("vocab_size", 0)))
        self._grammars = Grammars(self._vocabulary)
        limits = self._spec.engine
        self._adapter_cache = AdapterCache(
            self._engine, self._source, max_bytes=limits.host_cache_bytes, fetch_timeout_s=limits.fetch_timeout_s
        )
        self._metrics = ReplicaMetrics(self._name, base.digest, self._reason, self._engine.stats, self._adapters)
        if ray.is_initialized():
            self._metrics.start_ray_export()
        self._registry = Registry(self._spec, self._source, self._adapter_cache, self._engine)
        self._engine.start()
        await self._warm_up(self._spec)
        if follows:
            await self._warm_up_live_config()
        self._owner = asyncio.create_task(end_with(owner, self._spec.name)) if owner else None
        self._ready_at = int(time.time())

    async def choices(self, request: ArmRequest) -> list[ArmAnswer]:
        """Return the `n` answers to a request, in order.

        Raises ApiError. Cancelling the call ends the request in the engine.
        """
        async with aclosing(self.stream(request)) as chunks:
            answers = [chunk async for chunk in chunks if isinstance(chunk, ArmAnswer)]
        return sorted(answers, key=attrgetter("index"))

    async def stream(self, request: ArmRequest) -> AsyncGenerator[StreamChunk]:
        """Yield a `StreamStart` once the request is admitted, then pieces of each answer, and each whole answer.

        Raises ApiError; where the request can't be served, before the first chunk.
        """
        arrived = time.perf_counter()
        with self._metrics.traffic.request() as watch:
            try:
                admitted = await self._admit(request)
                queued = self._generate_requests(request, admitted, arrived)
                bursts = generate(self._engine, queued, admitted.hold.close)
                await anext(bursts)
            except ApiError:
                raise
            except GraftworkError as error:
                raise to_api_error(error) from error
            prompt, version, stop_ids = admitted.prompt, admitted.version, queued[0].stop_ids
            task, cold = (admitted.pin.manifest.task, admitted.pin.cold) if admitted.pin else (None, False)
            watch.admitted(request.arm.name, task, version)
            async with aclosing(bursts):
                yield (start := StreamStart(self._base_digest, version, len(prompt.ids)))
                with_logprobs, decode = request.sampling.logprobs is not None, self._template.decode
                answers = [
                    StreamedAnswer(
                        index,
                        prompt,
                        stop_ids,
                        arrived,
                        TextStream(decode, request.sampling.stop),
                        LogprobStream(self._vocabulary.spell, self._template.special_ids) if with_logprobs else None,
                    )
                    for index in range(request.n)
                ]
                async for events in bursts:
                    for index, arrivals in events.items():
                        answer = answers[index]
                        watch.burst(sum(event.token_id >= 0 for event in arrivals), index)
                        delta = answer.add(arrivals)
                        if delta.text or delta.logprobs or not answer.finish_reason:
                            yield delta
                        if answer.finish_reason:
                            watch.answer = answer.answer(request, task, start, cold=cold)
                            yield watch.answer

    async def likelihood(
        self, arm: ArmSpec, question: Question, continuations: Sequence[str], request_id: str
    ) -> list[Likelihood]:
        """Return how likely the arm is to answer with each text, in order; nothing is generated.

        A text's tokens stand right behind the prompt; the token that would end the answer is not one of them. The arm's
        grammar and decoding play no part. Raises ApiError. Cancelling the call ends its requests in the engine.
        """
        arrived = time.perf_counter()
        found: dict[int, Likelihood] = {}
        with as_api_errors():
            scored = await self._loop.run_in_executor(self._threads, _continuation_ids, continuations, self._template)
            request = ArmRequest(arm, question, request_id, max_new_tokens=max(map(len, scored)))
            admitted = await self._admit(request, grammar=False)
            requests = [
                GenerateRequest(
                    f"{request_id}/{index}",
                    admitted.prompt.ids,
                    adapter=admitted.version,
                    continuation=ids,
                    arrived=arrived,
                )
                for index, ids in enumerate(scored)
            ]
            async with aclosing(generate(self._engine, requests, admitted.hold.close)) as bursts:
                async for events in bursts:
                    for index, [event] in events.items():
                        if event.logprob is None:
                            raise engine_failure(event)
                        found[index] = Likelihood(event.logprob, len(scored[index]))
        return [found[index] for index in range(len(scored))]

    async def refresh(self, ref: str) -> Json:
        """Read `task@alias` again: new requests get the version it points at. Loads it first; running requests stay.

        Raises ApiError; then nothing changed.
        """
        began = time.perf_counter()
        with as_api_errors(), self._metrics.swap():
            old, new = await self._adapter_cache.refresh(ref)
        return {"adapter": ref, "old": old, "new": new, "swap_ms": round((time.perf_counter() - began) * 1000, 1)}

    async def prepare(self, arms: Sequence[Json], adapters: Sequence[str]) -> None:
        """Read, compile and load what these arms and adapters need, so that no request waits for it.

        Raises ApiError that names what can't be served; what was loaded by then stays until its room is needed.
        """
        spec = self._spec.with_({"arms": arms, "adapters": adapters})
        try:
            await self._warm_up(spec)
        except GraftworkError as error:
            status = 503 if isinstance(error, StorageError) else 400
            raise ApiError(status, error.text(), code="invalid_config") from error

    async def registry(self, verb: str, *args: Any) -> Any:
        """A method of `Registry` by name. Raises ApiError."""
        assert verb in VERBS, f"no verb {verb!r}"
        with as_api_errors():
            return await getattr(self._registry, verb)(*args)

    async def models(self, ref: str | None = None) -> Json:
        """The store's adapters made for this base: names and age. When this replica became ready (s).

        ref: `task@alias-or-version` for that one alone, "" for none.
        """
        with as_api_errors():
            followed = self._adapter_cache.resolved_refs()
            if ref is None:
                listed = await self._loop.run_in_executor(self._threads, self._source.list_published)
                found = as_served(listed, followed)
            elif ref:
                describe = self._source.describe_version
                found = await self._loop.run_in_executor(self._threads, describe, ref, followed.get(ref))
            else:
                found = []
        adapters = [
            {"task": manifest.task, "version": manifest.version, "aliases": aliases, "created_at": manifest.created_at}
            for manifest, aliases in found
        ]
        return {"adapters": adapters, "ready_at": self._ready_at}

    async def longest_token_bytes(self) -> int:
        """UTF-8 bytes of text that one token of the base holds at most."""
        return self._template.longest_token_bytes

    async def adapters(self) -> list[Json]:
        """Every version in the engine or on its way there."""
        return self._adapters()

    async def snapshot(self) -> ReplicaSnapshot:
        """Return state and counts of this replica: the source of GET /metrics, /v1/stats, /v1/live and the page."""
        return self._metrics.snapshot()

    def _adapters(self) -> list[Json]:
        slots = {slot.version: asdict(slot) for slot in self._engine.adapters()}
        return [{**slots.get(r.version, {}), **asdict(r), "replica": self._name} for r in self._adapter_cache.states()]

    async def record_routing_stats(self) -> Json:
        """Called by Serve each second: what AdapterRouter knows of this replica."""
        ready = [r for r in self._adapter_cache.states() if r.state == "ready"]
        by_version = {f"{ref.partition('@')[0]}@{r.version}" for r in ready for ref in r.refs}
        return {RESIDENTS: sorted(by_version.union(*(r.refs for r in ready)))}

    async def ready(self) -> bool:
        """Return True while the engine decodes; Serve sends nothing before it is warm."""
        return self._engine.alive()

    async def check_health(self) -> None:
        """Called by Serve. Raises RunError when the engine no longer decodes."""
        if not self._engine.alive():
            raise RunError("the engine", "its thread has ended", "", "the replica is replaced")

    def stop(self) -> None:
        """End the engine where no Serve ends the process; requests get an error. Blocks until the thread has ended."""
        self._engine.stop()
        self._adapter_cache.close()

    async def _admit(self, request: ArmRequest, *, grammar: bool = True) -> _Admitted:
        arm, question = request.arm, request.question
        require_bytes(size_of(question), self._template.longest_token_bytes, self._engine.max_request_tokens(None))
        with ExitStack() as hold:
            pin = await self._adapter_cache.pin(arm.adapter) if arm.adapter else None
            if pin is not None:
                hold.callback(self._adapter_cache.release, pin)
            version = pin.manifest.version if pin else None
            passages = await self._passages(arm, question) if arm.retriever else ()
            building = partial(
                build_prompt,
                arm,
                question,
                self._template.on(pin.manifest.template_date) if pin else self._template,
                max_seq_len=self._engine.max_request_tokens(version),
                trained=trained_prompt(pin.manifest) if pin else None,
                max_new_tokens=request.max_new_tokens,
                max_prompt_tokens=request.max_prompt_tokens,
                passages=passages,
            )
            prompt = await self._loop.run_in_executor(self._threads, building)
            compiled = None
            if grammar and (request.grammar or arm.grammar or request.sampling.logprobs is not None):
                compiled = await self._loop.run_in_executor(self._threads, self._grammar, arm, request)
            return _Admitted(prompt, compiled, pin, version, hold.pop_all())

    def _generate_requests(self, request: ArmRequest, admitted: _Admitted, arrived: float) -> list[GenerateRequest]:
        """Return one engine request for each answer."""
        sampling = replace(request.sampling, max_new_tokens=admitted.prompt.max_new_tokens)
        stop_ids = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else admitted.prompt.stop_ids)
        return [
            GenerateRequest(
                request.request_id if request.n == 1 else f"{request.request_id}/{index}",
                admitted.prompt.ids,
                replace(sampling, seed=choice_seed(sampling.seed, index)) if index else sampling,
                stop_ids,
                admitted.version,
                grammar=admitted.grammar,
                background=request.background,
                cache_salt="" if self._spec.engine.share_prefix_cache else request.cache_salt,
                arrived=arrived,
            )
            for index in range(request.n)
        ]

    def _grammar(self, arm: ArmSpec, request: ArmRequest | None = None) -> Grammar | None:
        """Compile the grammar of the request or its arm; build the vocabulary's table where it will be needed."""
        asked = request.grammar if request else None
        if request is not None and request.sampling.logprobs is not None:
            self._vocabulary.open()
        if asked is not None and arm.grammar is not None:
            raise bad_request(
                f"The arm {arm.name!r} has its own grammar: leave response_format and regex out.",
                param="response_format" if asked.kind == "json_schema" else "regex",
            )
        text = asked or (read_grammar(arm.grammar) if arm.grammar else None)
        return self._grammars.compile(text) if text is not None else None

    async def _passages(self, arm: ArmSpec, question: Question) -> tuple[Passage, ...]:
        """Return what the arm's retriever finds, reranked where the arm says so: then each candidate is a prefill of
        the base in the engine's own batches, and the event loop only waits.
        """
        if arm.retriever is None or isinstance(question, str):
            return ()
        found = await self._loop.run_in_executor(self._threads, find, arm, question)
        if arm.retriever.rerank is None:
            return found
        return await rerank(query_of(arm, question), found, self.likelihood, arm.retriever.k)

    async def _warm_up(self, spec: ServeSpec) -> None:
        for arm in spec.arms:
            await self._loop.run_in_executor(self._threads, warm, arm.prompt, arm.retriever)
            await self._loop.run_in_executor(self._threads, self._grammar, arm)
        for ref in dict.fromkeys([*spec.adapters, *(arm.adapter for arm in spec.arms if arm.adapter)]):
            self._adapter_cache.release(await self._adapter_cache.pin(ref))

    async def _warm_up_live_config(self) -> None:
        """Warm up as the other engines are. What can't be loaded now is tried again by the first request for it."""
        try:
            spec = await self._loop.run_in_executor(self._threads, read_live_record, self._spec)
            if spec is not None:
                await self._warm_up(spec)
        except GraftworkError as error:
            log.warning("this engine starts without all that the others hold: %s", error)


def _continuation_ids(texts: Sequence[str], template: Template) -> list[tuple[int, ...]]:
    """Return the ids of each text as it stands right behind a prompt, without special tokens. Raises ApiError."""
    if not texts:
        raise bad_request("continuations is empty: there is nothing to be scored.", param="continuations")
    for number, text in enumerate(texts):
        if not text:
            raise bad_request(f"continuation {number} is empty: it has no token.", param="continuations")
    return [tuple(template.continuation_ids(text)) for text in texts]


def _replica_name() -> str:
    """Serve's id of this replica; outside Serve its process."""
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return f"pid-{os.getpid()}"
