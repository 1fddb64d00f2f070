"""A stand-in for vLLM's AsyncLLM (0.29.0), which needs CUDA: its calls and outputs over a tiny model of transformers.

It decodes greedily, one token of one request at a time, with real adapters through PEFT. As vLLM does, it keys what it
keeps of a prompt by the adapter's name and its adapters by their integer id: a name or id that comes back for other
weights gives the old answer. What it cannot show is vLLM itself; for that the same tests run where vLLM can.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graftwork.serving.vllm.translate import LoadedLora
from tests.engines import load_model

BLOCK = 16


@dataclass(frozen=True)
class LoraRequest:
    """`vllm.lora.request.LoRARequest`"""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass(frozen=True)
class Logprob:
    """`vllm.logprobs.Logprob`"""

    logprob: float
    rank: int | None


@dataclass(frozen=True)
class Completion:
    """`vllm.outputs.CompletionOutput` of a delta"""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None


@dataclass(frozen=True)
class RequestOutput:
    """`vllm.outputs.RequestOutput`"""

    outputs: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int | None


class PlainWords:
    """vLLM's objects as plain data."""

    def prompt(self, ids: tuple[int, ...], cache_salt: str) -> dict[str, Any]:
        return {"prompt_token_ids": list(ids), "cache_salt": cache_salt}

    def sampling(self, arguments: dict[str, Any], grammar: dict[str, str] | None) -> dict[str, Any]:
        return {**arguments, "structured_outputs": grammar}

    def lora(self, lora: LoadedLora) -> LoraRequest:
        return LoraRequest(lora.name, lora.number, str(lora.folder))


@dataclass
class StandIn:
    """One engine. `most_loras`: how many adapters it held at most; `aborted`: ids of requests that were broken off."""

    base: Path
    errored: bool = False
    aborted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from tokenizers import Tokenizer

        self._loras: dict[int, Any] = {}
        self._plain = load_model(self.base)
        self._kept: dict[tuple[str, str, tuple[int, ...]], torch.Tensor] = {}
        self._tokenizer = Tokenizer.from_file(str(self.base / "tokenizer.json"))

    async def add_lora(self, lora_request: LoraRequest) -> bool:
        if lora_request.lora_int_id not in self._loras:
            from peft import PeftModel

            model = PeftModel.from_pretrained(load_model(self.base), lora_request.lora_path).eval()
            self._loras[lora_request.lora_int_id] = model
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return self._loras.pop(lora_id, None) is not None

    @property
    def lora_ids(self) -> set[int]:
        """Adapters held now."""
        return set(self._loras)

    def shutdown(self) -> None:
        self.errored = True

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: LoraRequest | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        sampling_params = {"stop_token_ids": [], "stop": [], "min_tokens": 0, "logprobs": None, **sampling_params}
        ids, done = list(prompt["prompt_token_ids"]), False
        start, name = len(ids), lora_request.lora_name if lora_request else ""
        model = self._loras[lora_request.lora_int_id] if lora_request else self._plain
        key = (prompt["cache_salt"], name, tuple(ids))
        cached = (start - 1) // BLOCK * BLOCK if key in self._kept else 0
        try:
            while not done:
                await asyncio.sleep(0)  # other requests' tokens
                logits_V = self._kept[key] if len(ids) == start and cached else _last_logits(model, ids)
                self._kept.setdefault(key, logits_V)
                token = int(logits_V.argmax())
                ids.append(token)
                reason = self._reason(ids[start:], sampling_params)
                done = reason is not None
                places = _places(logits_V, token, sampling_params["logprobs"])
                told = _prompt_places(model, ids[:-1]) if sampling_params.get("prompt_logprobs") else None
                yield RequestOutput([Completion([token], places, reason)], told, cached)
        finally:
            if not done:
                self.aborted.append(request_id)

    def _reason(self, said: list[int], params: dict[str, Any]) -> str | None:
        if said[-1] in params["stop_token_ids"] and len(said) > params["min_tokens"]:
            return "stop"
        if any(stop in self._tokenizer.decode(said) for stop in params["stop"]):
            return "stop"
        return "length" if len(said) == params["max_tokens"] else None


def _last_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits


def _prompt_places(model: Any, ids: list[int]) -> list[dict[int, Logprob] | None]:
    """Of each token of a prompt but the first, given those before it."""
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
    told: list[dict[int, Logprob] | None] = [None]
    for logits_V, token in zip(logits_TV[:-1], ids[1:], strict=True):
        told += _places(logits_V, token, 1) or []
    return told


def _places(logits_V: torch.Tensor, token: int, count: int | None) -> list[dict[int, Logprob]] | None:
    """The chosen token's log probability and those of the `count` best, by rank."""
    if count is None:
        return None
    logs_V = logits_V.log_softmax(-1)
    best = logs_V.topk(count).indices.tolist() if count else []
    ranks = {other: place for place, other in enumerate(best, start=1)}
    ranks.setdefault(token, int((logs_V > logs_V[token]).sum()) + 1)
    return [{other: Logprob(float(logs_V[other]), rank) for other, rank in ranks.items()}]
