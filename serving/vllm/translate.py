"""Translation between our requests, events and spec and vLLM's (0.29.0). Plain data.

vLLM's outputs become one event a token and exactly one last event. A request becomes the keyword arguments of
`vllm.SamplingParams` and `StructuredOutputsParams`, a spec those of `vllm.AsyncEngineArgs`. What vLLM would do
otherwise than our engine is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from graftwork.errors import ConfigError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.request import FinishReason, GenerateRequest, SamplingError, SamplingParams, TokenEvent
from graftwork.serving.spec import EngineSpec

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
        [completion] = output.outputs  # n=1
        reason = _finish_reason(completion.finish_reason)
        if self.continuation and output.prompt_logprobs:
            return [TokenEvent(self.request_id, -1, self._score(output.prompt_logprobs), "scored")]
        if self.continuation and reason in (None, "stop", "length"):
            return []
        places = completion.logprobs or [{}] * len(completion.token_ids)
        events = [
            self._token(token, place, output.num_cached_tokens or 0)
            for token, place in zip(completion.token_ids, places, strict=True)
        ]
        if reason in (None, "stop", "length") and events:
            events[-1] = replace(events[-1], finish_reason=reason)
        elif reason is not None:
            error = f"vLLM ended it with finish_reason={completion.finish_reason}" if reason == "error" else None
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


def _finish_reason(reason: str | None) -> FinishReason | None:
    return None if reason is None else _REASONS.get(reason, "error")


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM lifts lower temperatures to 0.01 with a log line, and refuses higher ones."""
MAX_PENALTY = 2.0


def sampling_arguments(request: GenerateRequest) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams`; output kind and grammar are the caller's. Raises SamplingError.

    The base's own end tokens do not count: only the request's stop ids end an answer, as in our engine. With a grammar
    they do, because a finished grammar allows nothing else. A continuation is scored as the end of a prompt; vLLM makes
    one token more, which nobody is told.
    """
    if request.continuation:
        return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1, "detokenize": False}
    wanted = request.sampling
    for key, rule in _differences(wanted):
        raise SamplingError(f"{key}={getattr(wanted, key)!r}", "engine.kind=vllm", rule, "use engine.kind=graftwork")
    return {
        "max_tokens": wanted.max_new_tokens,
        "min_tokens": wanted.min_new_tokens,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "top_k": wanted.top_k,
        "min_p": wanted.min_p,
        "seed": wanted.seed,
        "repetition_penalty": wanted.repetition_penalty,
        "frequency_penalty": wanted.frequency_penalty,
        "presence_penalty": wanted.presence_penalty,
        "logit_bias": dict(wanted.logit_bias) or None,
        "logprobs": wanted.logprobs,
        "stop": list(wanted.stop),
        "stop_token_ids": sorted(request.stop_ids),
        "ignore_eos": request.grammar is None,
        "detokenize": bool(wanted.stop),  # the text is made from the ids, in the replica
        "skip_special_tokens": True,  # as `Template.decode` does where our engine looks for stop strings
    }


def grammar_arguments(request: GenerateRequest) -> dict[str, str] | None:
    """Arguments of `StructuredOutputsParams`; None without a grammar."""
    if request.grammar is None:
        return None
    text = request.grammar.text
    return {{"json_schema": "json", "regex": "regex"}[text.kind]: text.text}


def _differences(wanted: SamplingParams) -> Iterator[tuple[str, str]]:
    """(parameter, what vLLM does otherwise) for each value that vLLM would not treat as our engine does."""
    if 0 < wanted.temperature < MIN_TEMPERATURE or wanted.temperature > MAX_TEMPERATURE:
        yield "temperature", f"vLLM takes 0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}"
    for key in ("frequency_penalty", "presence_penalty"):
        if abs(getattr(wanted, key)) > MAX_PENALTY:
            yield key, f"vLLM takes -{MAX_PENALTY:g} to {MAX_PENALTY:g}"
    if wanted.min_p > 0 and wanted.top_p < 1 and wanted.temperature > 0:
        yield "min_p", "vLLM cuts by min_p before top_p, which then keeps other tokens; take one of the two"
    if wanted.stop and wanted.min_new_tokens:
        yield "min_new_tokens", "vLLM does not look for stop strings before min_new_tokens; take one of the two"
    if wanted.seed == -1:
        yield "seed", "vLLM reads -1 as no seed"


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""
BLOCK_TOKENS = 16
"""Tokens of one block of vLLM's key-value memory."""
HOST_ADAPTERS = 100_000
"""Versions in vLLM's host cache: more than fit, because residency bounds them by bytes and retires them itself. One
that vLLM dropped by its own rule would be read again from disk in the middle of a step."""
DEFAULTS_OF_VLLM = "vllm"
"""`generation_config`: the base's own sampling defaults are not taken over."""


def engine_arguments(folder: Path, spec: EngineSpec, quant: QuantSpec) -> dict[str, Any]:
    """Raises ConfigError for what vLLM cannot do as asked."""
    rank = next((rank for rank in RANKS if rank >= spec.max_rank), None)
    if rank is None:
        raise ConfigError(f"engine.max_rank={spec.max_rank}", "engine.kind=vllm", f"vLLM's ranks end at {RANKS[-1]}")
    return {
        "model": str(folder),
        "tokenizer": str(folder),
        "tensor_parallel_size": spec.tensor_parallel_size,
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        "max_model_len": spec.max_seq_len,
        "max_num_seqs": spec.max_batch,
        "max_num_batched_tokens": spec.prefill_tokens + spec.max_batch,  # decoded rows count too
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks_override": -(-spec.kv_tokens // BLOCK_TOKENS),
        "enable_prefix_caching": spec.prefix_cache,
        "enable_lora": True,
        "max_loras": min(spec.max_loaded, spec.max_batch),
        "max_cpu_loras": HOST_ADAPTERS,
        "max_lora_rank": rank,
        "generation_config": DEFAULTS_OF_VLLM,
        "seed": 0,
        "dtype": "bfloat16" if quant.dtype == "auto" else quant.dtype,  # as on every GPU that our own engine serves on
        **_quantisation(quant),
    }


def _quantisation(quant: QuantSpec) -> dict[str, Any]:
    """vLLM's bitsandbytes (its plugin) quantises at the start, to nf4 with quantised scales, and to nothing else."""
    if quant.method.vllm_problem:
        raise _other_weights(f"quant.kind={quant.kind}", quant.method.vllm_problem)
    if not quant.is_packed:
        return {}
    if not quant.double_quant:
        rule = "vLLM's bitsandbytes always quantises the scales too; other scales are other weights"
        raise _other_weights("quant.double_quant=false", rule)
    if quant.resident == "dequantised":
        raise _other_weights("quant.resident=dequantised", "vLLM keeps nf4 packed")
    return {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}


def _other_weights(asked: str, rule: str) -> ConfigError:
    move = "set quant.kind=none, or quant.kind=nf4 with double_quant=true, or engine.kind=graftwork"
    return ConfigError(asked, "engine.kind=vllm", rule, move)
