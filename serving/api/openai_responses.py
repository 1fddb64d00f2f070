"""Answers in the shape of the OpenAI API: whole, as stream chunks, as a list of models.

`openai.types` is the oracle of the tests, not a dependency: docs/log.md has the figures.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftwork.serving.detokenize import Spelled, TokenLogprob
from graftwork.serving.messages import ArmAnswer

Kind = Literal["chat", "text"]
Json = dict[str, Any]
OBJECTS: Mapping[tuple[Kind, bool], str] = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion",
    ("text", True): "text_completion",
}
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of one response share."""

    kind: Kind
    head: Json
    """The fields of the response before its choices."""

    @classmethod
    def open(cls, kind: Kind, request_id: str, model: str, base_digest: str, *, stream: bool = False) -> "Envelope":
        """Return an envelope stamped with the time now. model: as the caller wrote it."""
        head = {
            "id": request_id,
            "object": OBJECTS[kind, stream],
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{base_digest[:12]}",
        }
        return cls(kind, head)

    def build_response(self, answers: Sequence[ArmAnswer]) -> Json:
        """The request's answers as one object."""
        return {
            **self.head,
            "choices": [self._whole_choice(answer) for answer in answers],
            "usage": usage(answers),
            "graftwork": provenance(answers[0]),
        }

    def delta(self, text: str, *, index: int = 0, first: bool, logprobs: Sequence[TokenLogprob] | None = None) -> Json:
        """A chunk with the next piece of one answer's text. first: the chunk that opens the answer."""
        choice = self._choice(index, text, first=first, finish_reason=None)
        choice["logprobs"] = self._logprobs(logprobs) if logprobs else None
        return {**self.head, "choices": [choice]}

    def last(self, answer: ArmAnswer) -> Json:
        """The chunk that says why an answer ended and which version gave it."""
        choice = self._choice(answer.index, "", first=False, finish_reason=answer.finish_reason)
        return {**self.head, "choices": [choice], "graftwork": provenance(answer)}

    def usage_chunk(self, answers: Sequence[ArmAnswer]) -> Json:
        """The chunk that `stream_options.include_usage` asks for: no choices, token counts."""
        return {**self.head, "choices": [], "usage": usage(answers)}

    def _whole_choice(self, answer: ArmAnswer) -> Json:
        logprobs = None if answer.logprobs is None else self._logprobs(answer.logprobs)
        choice: Json = {"index": answer.index, "finish_reason": answer.finish_reason, "logprobs": logprobs}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        return choice

    def _choice(self, index: int, text: str, *, first: bool, finish_reason: str | None) -> Json:
        choice: Json = {"index": index, "finish_reason": finish_reason, "logprobs": None}
        if self.kind == "text":
            choice["text"] = text
        elif first:
            choice["delta"] = {"role": "assistant", "content": text}
        else:
            choice["delta"] = {"content": text} if text else {}
        return choice

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return chat_logprobs(logprobs) if self.kind == "chat" else text_logprobs(logprobs)


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> Json:
    """Log probabilities as a chat completion has them."""

    def entry(one: Spelled) -> Json:
        return {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}

    content = [{**entry(one.token), "top_logprobs": [entry(other) for other in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: Sequence[TokenLogprob]) -> Json:
    """Log probabilities as the older text completion has them. The chosen token is always among the alternatives."""
    tops = [{other.text: other.logprob for other in (*one.top, one.token)} if one.top else None for one in logprobs]
    return {
        "tokens": [one.token.text for one in logprobs],
        "token_logprobs": [one.token.logprob for one in logprobs],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [one.offset for one in logprobs],
    }


def usage(answers: Sequence[ArmAnswer]) -> Json:
    """Token counts over the answers of one request; its prompt counts once, cached as the first answer found it."""
    prompt, completion = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(answer.cached_tokens for answer in answers)},
    }


def provenance(answer: ArmAnswer) -> Json:
    """Our extension field: which arm, version and base answered, from which passages, how soon."""
    return {
        "arm": answer.arm,
        "adapter": answer.adapter,
        "adapter_version": answer.adapter_version,
        "base_digest": answer.base_digest,
        "retrieved_ids": list(answer.retrieved_ids),
        "left_out_ids": list(answer.left_out_ids),
        "cited_ids": list(answer.cited_ids),
        "ttft_ms": round(answer.ttft_ms, 3),
        "latency_ms": round(answer.latency_ms, 3),
    }


def identity(arm: str, base_digest: str, version: str | None) -> dict[str, str]:
    """Response headers that say what answered, for callers that don't read the body. No version: the base alone."""
    found = {"x-graftwork-arm": arm, "x-graftwork-base-digest": base_digest}
    return found | ({"x-graftwork-adapter-version": version} if version is not None else {})


def sse(chunk: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def model_card(model: str, created: int, *, owned_by: str = "graftwork", **extra: str | None) -> Json:
    """One entry of GET /v1/models."""
    return {"id": model, "object": "model", "created": created, "owned_by": owned_by, "graftwork": extra}
