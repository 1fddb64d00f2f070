"""What every engine refuses at its door, before anything is queued."""

from graftwork.errors import DataError
from graftwork.serving.engine.types import GenerateRequest, SamplingError, SamplingParams


def check_request(request: GenerateRequest, *, max_seq_len: int, vocab_size: int, decodes: bool) -> None:
    """Raises DataError (prompt empty or too long, token id out of range, a continuation that is scored and sampling or
    a grammar), SamplingError (a value out of its range).

    decodes: the engine can turn ids into text, which stop strings need.
    """
    name, length = f"request {request.request_id!r}", len(request.prompt_ids)
    if length == 0:
        raise DataError(name, "an empty prompt", "a prompt has at least one token")
    known = request.prompt_ids + request.continuation
    low, high = min(known), max(known)
    if low < 0 or high >= vocab_size:
        raise DataError(name, f"token id {low if low < 0 else high}", f"token ids are from 0 to {vocab_size - 1}")
    if request.continuation:
        _check_scored(request, name, max_seq_len)
        return
    if length + request.sampling.max_new_tokens > max_seq_len:
        found = f"{length} prompt tokens + max_new_tokens={request.sampling.max_new_tokens}"
        rule = f"prompt and answer fit into engine.max_seq_len={max_seq_len}"
        raise DataError(name, found, rule, "shorten the prompt, lower max_new_tokens or raise engine.max_seq_len")
    problem = request.sampling.problem()
    if problem:
        raise SamplingError(f"{problem[0]}={problem[1]}", "", problem[2])
    for key, ids in (("logit_bias", dict(request.sampling.logit_bias)), ("stop_ids", request.stop_ids)):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise SamplingError(f"{key}: token id {outside[0]}", "", f"token ids are from 0 to {vocab_size - 1}")
    if request.sampling.stop and not decodes:
        raise DataError(name, "stop strings", "stop strings need an engine that was given `decode`")


def _check_scored(request: GenerateRequest, name: str, max_seq_len: int) -> None:
    if request.sampling != SamplingParams() or request.stop_ids or request.grammar is not None:
        found = "a continuation, and sampling, stop ids or a grammar"
        raise DataError(name, found, "nothing is generated where a continuation is scored", "leave one of the two out")
    total = len(request.prompt_ids) + len(request.continuation)
    if total > max_seq_len:
        found, rule = f"{total} tokens of prompt and continuation", f"they fit into engine.max_seq_len={max_seq_len}"
        raise DataError(name, found, rule, "shorten one of them or raise engine.max_seq_len")
