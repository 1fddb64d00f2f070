"""Answers in the shape of the OpenAI API: whole, as stream chunks, as a list of models."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graftwork.serving.arms import ArmAnswer

Kind = Literal["chat", "text"]
Json = dict[str, Any]
OBJECTS: Mapping[tuple[Kind, bool], str] = {
    ("chat", False): "chat.completion", ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion", ("text", True): "text_completion",
}  # fmt: skip
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of one response share."""

    kind: Kind
    request_id: str
    model: str
    """As the caller wrote it."""
    base_digest: str
    created: int

    @classmethod
    def open(cls, kind: Kind, request_id: str, model: str, base_digest: str) -> "Envelope":
        """An envelope stamped with the time now."""
        return cls(kind, request_id, model, base_digest, int(time.time()))

    def whole(self, answer: ArmAnswer) -> Json:
        """The whole answer as one object."""
        choice: Json = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        return {
            **self._head(stream=False),
            "choices": [choice],
            "usage": usage(answer),
            "graftwork": provenance(answer),
        }

    def delta(self, text: str, *, first: bool) -> Json:
        """A chunk with the next piece of text."""
        return {**self._head(stream=True), "choices": [self._choice(text, first=first, finish_reason=None)]}

    def last(self, answer: ArmAnswer) -> Json:
        """The chunk that says why the answer ended and which version gave it."""
        choice = self._choice("", first=False, finish_reason=answer.finish_reason)
        return {**self._head(stream=True), "choices": [choice], "graftwork": provenance(answer)}

    def usage_chunk(self, answer: ArmAnswer) -> Json:
        """The chunk that `stream_options.include_usage` asks for: no choices, token counts."""
        return {**self._head(stream=True), "choices": [], "usage": usage(answer)}

    def _choice(self, text: str, *, first: bool, finish_reason: str | None) -> Json:
        choice: Json = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if self.kind == "text":
            choice["text"] = text
        elif first:
            choice["delta"] = {"role": "assistant", "content": text}
        else:
            choice["delta"] = {"content": text} if text else {}
        return choice

    def _head(self, *, stream: bool) -> Json:
        return {
            "id": self.request_id, "object": OBJECTS[self.kind, stream], "created": self.created, "model": self.model,
            "system_fingerprint": fingerprint(self.base_digest),
        }  # fmt: skip


def fingerprint(base_digest: str) -> str:
    """OpenAI's `system_fingerprint`: which base answered."""
    return f"fp_{base_digest[:12]}"


def usage(answer: ArmAnswer) -> Json:
    """Token counts."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def provenance(answer: ArmAnswer) -> Json:
    """Our extension field: which arm, version and base answered, from which passages, how soon."""
    return {
        "arm": answer.arm, "adapter": answer.adapter, "adapter_version": answer.adapter_version,
        "base_digest": answer.base_digest, "retrieved_ids": list(answer.retrieved_ids),
        "ttft_ms": round(answer.ttft_ms, 3), "latency_ms": round(answer.latency_ms, 3),
    }  # fmt: skip


def sse(chunk: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def model_card(model: str, created: int, *, owned_by: str = "graftwork", **extra: str | None) -> Json:
    """One entry of GET /v1/models."""
    return {"id": model, "object": "model", "created": created, "owned_by": owned_by, "graftwork": extra}
