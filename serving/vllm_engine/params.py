"""Our request in vLLM's words, field by field. What vLLM would do otherwise than our engine is refused, never bent.

Plain data: the keyword arguments of `vllm.SamplingParams` and of its `StructuredOutputsParams` (vLLM 0.29.0).
"""

from collections.abc import Iterator
from typing import Any

from graftwork.serving.engine.types import GenerateRequest, SamplingError, SamplingParams

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
