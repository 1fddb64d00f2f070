"""Translation between our requests, events, adapters and spec and vLLM's (0.29.0). Plain data, for any thread.

vLLM's outputs become one event a token and exactly one last event. A request becomes the keyword arguments of
`vllm.SamplingParams` and `StructuredOutputsParams`, a spec those of `vllm.AsyncEngineArgs`. What vLLM would do
otherwise than our engine is refused.
"""

import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from graftwork.errors import ArtifactError, ConfigError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.adapters.weights_file import read_bytes, read_tensors
from graftwork.serving.engine.request import (
    FinishReason,
    GenerateRequest,
    SamplingError,
    SamplingParams,
    SlotState,
    TokenEvent,
)
from graftwork.serving.spec import EngineSpec

_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled", "error": "error"}


class VllmLogprob(Protocol):
    """The part of `vllm.logprobs.Logprob` that is read."""

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
    """Events of one request. `top`: alternatives reported for each token; `continuation`: tokens to be scored."""

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
    one token more, which is dropped.
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
"""Values that vLLM takes as `max_lora_rank`."""
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


# Adapter versions in vLLM: the ids under which it holds them, their holders, and what it would misread.
#
# Every load of a version gets an integer id and a name that were never used before. vLLM keys its prefix cache by the
# name and its adapter slots by the id, so no later version can meet an earlier one's keys and values or weights, and
# `load_inplace` (read again from disk at every step: vllm-project/vllm#33791) is never needed.
#
# vLLM 0.29 takes r, lora_alpha, target_modules, bias, modules_to_save, use_rslora and use_dora from adapter_config.json
# (`vllm/lora/peft_helper.py`) and passes over every other key without a word; a `rank_pattern` or `alpha_pattern` would
# give wrong answers. So all keys but those that change no served weight must be at the value that does nothing.

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_READ_BY_VLLM = frozenset({"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules"})
_WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"}
    | {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
    | {"runtime_config", "ensure_weight_tying", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
"""Training and bookkeeping; which modules are adapted is read from the weights' names."""
_NEUTRAL_INIT = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is."""


@dataclass(frozen=True)
class Checked:
    """An adapter that vLLM serves as PEFT would."""

    rank: int
    size_bytes: int
    """Of its weights."""


def check_adapter(folder: Path, digests: Mapping[str, str] | None, *, max_rank: int) -> Checked:
    """Reads the folder, compares sha256 where given, and refuses by key. Raises ArtifactError."""
    digests = digests or {}
    path = folder / CONFIG_FILE
    try:
        config = json.loads(read_bytes(path, digests.get(CONFIG_FILE), most=MAX_CONFIG_BYTES))
    except ValueError as error:
        raise ArtifactError(str(path), str(error), "adapter_config.json holds one JSON object") from error
    rank = _rank(config, path, max_rank)
    tensors = read_tensors(folder / WEIGHTS_FILE, digests.get(WEIGHTS_FILE))
    return Checked(rank, sum(tensor.nbytes for tensor in tensors.values()))


def _rank(config: Any, path: Path, max_rank: int) -> int:
    if not isinstance(config, dict):
        raise ArtifactError(str(path), type(config).__name__, "adapter_config.json holds one JSON object")
    if config.get("peft_type") != "LORA":
        raise _refusal(path, "peft_type", config.get("peft_type"), "vLLM serves LoRA adapters")
    if config.get("init_lora_weights", True) not in _NEUTRAL_INIT:
        raise _refusal(path, "init_lora_weights", config["init_lora_weights"], "it changes the base weights")
    for key, value in config.items():
        neutral = not value or (key, value) == ("bias", "none") or key == "init_lora_weights"
        if key not in _READ_BY_VLLM and key not in _WITHOUT_EFFECT and not neutral:
            raise _refusal(path, key, value, "vLLM does not honour it")
    rank = config.get("r", 8)
    if not isinstance(rank, int) or rank < 1 or rank > max_rank:
        raise _refusal(path, "r", rank, f"ranks are from 1 to engine.max_rank={max_rank}")
    return rank


def _refusal(path: Path, key: str, value: object, rule: str) -> ArtifactError:
    return ArtifactError(str(path), f"{key}={value!r:.120}", rule, "serve it with engine.kind=graftwork")


@dataclass(frozen=True)
class LoadedLora:
    """One load of a version, as vLLM knows it."""

    version: str
    number: int
    """`lora_int_id`, from 1."""
    folder: Path
    rank: int
    size_bytes: int

    @property
    def name(self) -> str:
        """`lora_name`: never used twice, even when the same version is loaded again."""
        return f"{self.version}#{self.number}"


@dataclass
class _LoraSlot:
    lora: LoadedLora
    holders: int = 0
    retired: bool = False


class Loras:
    """The table. A `LoadedLora` that `retire` or `release` returns is unused: the caller removes it from vLLM."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._slots: dict[str, _LoraSlot] = {}  # least recently used first

    def new(self, version: str, folder: Path, rank: int, size_bytes: int) -> LoadedLora:
        """A fresh id for a load that is about to happen."""
        return LoadedLora(version, next(self._numbers), folder, rank, size_bytes)

    def revive(self, version: str) -> LoadedLora | None:
        """The version where it is loaded already; it takes new requests (again)."""
        with self._lock:
            slot = self._slots.get(version)
            if slot is None:
                return None
            slot.retired = False
            return slot.lora

    def add(self, lora: LoadedLora) -> None:
        """vLLM has loaded it."""
        with self._lock:
            assert lora.version not in self._slots, "one load of a version at a time"
            self._slots[lora.version] = _LoraSlot(lora)

    def retire(self, version: str) -> LoadedLora | None:
        """No new holder. Returns it where nobody holds it. ArtifactError for a version that is not loaded."""
        with self._lock:
            slot = self._find(version)
            slot.retired = True
            return self._drop_if_done(slot)

    def acquire(self, version: str) -> LoadedLora:
        """Holds the version for one request. ArtifactError where it is not loaded or retired."""
        with self._lock:
            slot = self._find(version)
            if slot.retired:
                raise ArtifactError(f"adapter {version}", "retired", "a retired version takes no new requests")
            slot.holders += 1
            self._slots[version] = self._slots.pop(version)
            return slot.lora

    def release(self, lora: LoadedLora) -> LoadedLora | None:
        """Lets go of what `acquire` returned. Returns it where that was the last hold on a retired version."""
        with self._lock:
            slot = self._slots[lora.version]
            slot.holders -= 1
            return self._drop_if_done(slot)

    def states(self) -> list[SlotState]:
        """Loaded versions, least recently used first."""
        with self._lock:
            return [
                SlotState(version, slot.lora.rank, slot.lora.size_bytes, slot.holders, slot.retired)
                for version, slot in self._slots.items()
            ]

    def _find(self, version: str) -> _LoraSlot:
        if version not in self._slots:
            rule = "a request names a loaded version"
            raise ArtifactError(f"adapter {version}", "not loaded", rule, "load it first")
        return self._slots[version]

    def _drop_if_done(self, slot: _LoraSlot) -> LoadedLora | None:
        if slot.retired and slot.holders == 0:
            del self._slots[slot.lora.version]
            return slot.lora
        return None
