"""Specs of an endpoint: the engine and its limits, an arm, and the whole of what is served."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from graftwork.base.source import BaseSpec
from graftwork.config import Spec
from graftwork.planning.hardware import AUTO, Gpus, resolved_count
from graftwork.prompts.render import FunctionText, PromptSpec, without_unset
from graftwork.quantization import QuantSpec
from graftwork.retrieval import RetrieverSpec
from graftwork.retrieval.embedder import EmbedderSpec
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.storage.store import ALIAS_PATTERN, DEFAULT_ROOT, NAME_PATTERN

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class EngineSpec(Spec):
    """Which engine, and its limits in one replica. In YAML a plain string is its `kind`."""

    kind: Literal["graftwork", "vllm"] = "graftwork"
    """graftwork: our own, on CPU and one GPU; vllm: vLLM (extra `vllm`), for tensor parallelism on CUDA."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one replica is split over; more than 1 with kind vllm only."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU's memory that vLLM may take; kind vllm only."""
    max_batch: int = Field(default=64, ge=1)
    """Requests decoded together."""
    max_seq_len: int = Field(default=1024, ge=16)
    """Longest prompt plus answer in tokens; a longer request is refused."""
    kv_tokens: int = Field(default=32_768, ge=16)
    """Tokens of key-value memory over all requests; the rest wait in the queue."""
    prefill_tokens: int = Field(default=1024, ge=16)
    """Prompt tokens computed in one step at most, so that running requests go on."""
    max_rank: int = Field(default=64, ge=1)
    """Largest adapter rank that is admitted."""
    max_loaded: int = Field(default=64, ge=1)
    """Slots: adapter versions computed with at a time. A slot in use costs an adapter's bytes beside the host copy."""
    host_cache_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """Adapters held in this machine's memory; beyond it the one used longest ago goes. Any number may be registered."""
    fetch_timeout_s: float = Field(default=60.0, gt=0)
    """A store that takes longer for one answer fails the requests that wait for it, and no others."""
    prefix_cache: bool = True
    """Share the KV of equal prompt beginnings, keyed by (API key, adapter version digest, tokens)."""
    share_prefix_cache: bool = False
    """Share cached prefixes between API keys too. `cached_tokens` then reveals which prompts other keys have sent."""
    num_threads: int | None = None
    """Torch threads; null takes the replica's CPUs."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        foreign = ("num_threads",) if self.kind == "vllm" else ("tensor_parallel_size", "gpu_memory_utilization")
        for key in foreign:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"engine.{key} cannot take effect with engine.kind={self.kind!r}")
        return self

    def require_gpus(self, num_gpus: Gpus) -> None:
        """Raises ValueError where a replica with so many GPUs cannot hold this engine."""
        if self.kind == "vllm" and num_gpus not in (AUTO, self.tensor_parallel_size):
            raise ValueError(
                f"engine.kind='vllm' with tensor_parallel_size={self.tensor_parallel_size} "
                f"needs num_gpus={self.tensor_parallel_size}, found {num_gpus}"
            )


class GrammarSpec(Spec):
    """What an answer must look like; exactly one of the two. The answer is nothing but what it says."""

    json_schema: str | None = None
    """A path, `file://`, `s3://`, `recipe://NAME/FILE`, or the schema itself. An answer has its order of properties."""
    regex: str | None = None
    """A regular expression that the whole answer matches (Rust's syntax, no look-around)."""

    @field_validator("json_schema", mode="before")
    @classmethod
    def _inline_is_text(cls, value: object) -> object:
        """Kept as JSON text: the order of the properties is the order in the answer, so it belongs to the digest."""
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.json_schema is None) == (self.regex is None):
            raise ValueError("a grammar is a json_schema or a regex, exactly one of the two")
        if not (self.json_schema or self.regex or "").strip():
            raise ValueError("a grammar can't be empty")
        return self


class ArmSpec(Spec):
    """An arm is data: (base or adapter version) x (prompt template) x (retriever or none) x (decoding)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+._-]{0,62}$")]
    adapter: Annotated[str, Field(pattern=ALIAS_PATTERN)] | None = None
    """`task@alias` or `task@version`; null is the base model."""
    prompt: PromptSpec | None = None
    """System prompt and worked examples; null takes those that the adapter was trained with, and none for the base."""
    tools: tuple[FunctionText, ...] = ()
    """Functions that the assistant may call, in OpenAI's form, in place of the prompt's; a row's own come first."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template, over those of the prompt; a row's own come first."""
    retriever: RetrieverSpec | None = None
    max_new_tokens: int | None = Field(default=96, ge=1)
    """Longest answer in tokens; null allows what is left of the sequence."""
    grammar: GrammarSpec | None = None
    """What its answers must look like; null lets the model say anything."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self))


class AutoscalingSpec(Spec):
    """How many engine replicas: by the requests that each holds, running and queued in it."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_ongoing_requests: float = Field(default=32.0, gt=0)
    """Requests a replica is meant to hold; more start another one, fewer end one."""
    upscale_delay_s: float = Field(default=5.0, ge=0)
    """How long the load must have called for more replicas."""
    downscale_delay_s: float = Field(default=120.0, ge=0)
    """How long the load must have called for fewer; a replica that ends finishes its requests first."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        return self


class LimitsSpec(Spec):
    """What a caller may ask for. Rates are per key over the whole endpoint; the admin's own requests are free."""

    wrong_tokens_per_min: int = Field(default=60, ge=1)
    """Requests with a wrong token from one address; more get 429. Requests with a valid token are still answered."""
    requests_per_min: int | None = Field(default=None, ge=1)
    tokens_per_min: int | None = Field(default=None, ge=1)
    """Tokens of prompts, answers and embedded texts."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, below what engine.max_seq_len leaves."""
    max_n: int = Field(default=128, ge=1)
    """Answers to one request."""


class ServeSpec(Spec):
    """One endpoint: one base, many adapters, and the arms it answers as."""

    kind: Literal["serve"] = "serve"
    name: Annotated[str, Field(pattern=NAME_PATTERN)] = "graftwork"
    root: str = DEFAULT_ROOT
    base: BaseSpec
    quant: QuantSpec = QuantSpec()
    adapters: tuple[Annotated[str, Field(pattern=ALIAS_PATTERN)], ...] = ()
    """Loaded at start; others of the store load when first asked for."""
    arms: tuple[ArmSpec, ...] = ()
    """Answered under the model name `arm/NAME`."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template for the base's own model name; arms have theirs, adapters those of training."""
    experiments: tuple[ExperimentSpec, ...] = ()
    """Started with the endpoint; on a cluster, other weights in a changed file move them as `experiment ramp` does."""
    embedder: EmbedderSpec | None = None
    """Model behind /v1/embeddings, in a process of its own; null answers 404 there."""
    engine: EngineSpec = EngineSpec()
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]+$")], ...] = ()
    """Values of the Host header, without port, that are accepted in addition to loopback names and `host`. Empty with a
    wildcard `host` (0.0.0.0, ::): all are accepted, because a token is required there."""
    allowed_origins: tuple[Annotated[str, Field(pattern=r"^https?://[^/\s]+$")], ...] = ()
    """Other sites whose pages may call the endpoint from a browser, e.g. `https://app.example.com`."""
    token_env: str | None = None
    """Environment variable with the API token, or a line `name:token` per caller; needed to bind more than loopback."""
    admin_token_env: str | None = None
    """Environment variable with the admin's token. Without it the admin routes are open only where all are."""
    adapter_roots: tuple[str, ...] = ()
    """Where adapters may be registered from: folders, file:// or s3:// prefixes; none named: the root itself."""
    limits: LimitsSpec = LimitsSpec()
    request_timeout_s: float = Field(default=600.0, gt=0)
    """A request that takes longer is cancelled and answered with an error."""
    num_replicas: int = Field(default=1, ge=1)
    """Engine replicas, each with the whole base. Requests for an adapter go where it is loaded."""
    autoscaling: AutoscalingSpec | None = None
    """Let the load decide how many replicas there are, in place of num_replicas."""
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """How long a replica that is taken away may go on with the requests it has; then they get an error."""
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests that one replica holds, running and queued in its engine; the rest wait before it."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs of the engine replica."""
    num_gpus: Gpus = AUTO
    """GPUs of the engine replica; 0 computes on the CPU. auto: 1 where the target has GPUs, else 0; with engine.kind
    vllm as many as engine.tensor_parallel_size."""

    @property
    def gpus(self) -> float:
        """GPUs of a replica."""
        return resolved_count(self.num_gpus)

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Self:
        if self.host not in LOOPBACK and self.token_env is None:
            raise ValueError(f"host={self.host!r} is open to the network but token_env is not set")
        return self

    @model_validator(mode="after")
    def _replicas_are_said_once(self) -> Self:
        if self.autoscaling is None:
            return self
        if "num_replicas" in self.model_fields_set and self.num_replicas != 1:
            raise ValueError("autoscaling decides the number of replicas: leave num_replicas out")
        if self.autoscaling.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"autoscaling.target_ongoing_requests={self.autoscaling.target_ongoing_requests:g} is never reached: "
                f"a replica takes max_ongoing_requests={self.max_ongoing_requests}"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self))

    @property
    def base_arm(self) -> ArmSpec:
        """The arm behind the base's own model name."""
        return ArmSpec(name="base", max_new_tokens=None, chat_template_kwargs=self.chat_template_kwargs)

    @property
    def first_replicas(self) -> int:
        """Engine replicas at the start."""
        return self.autoscaling.min_replicas if self.autoscaling else self.num_replicas

    @property
    def most_replicas(self) -> int:
        """Engine replicas when the load is high."""
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        self.engine.require_gpus(self.num_gpus)
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: names must differ, found {names}")
        running = [experiment.name for experiment in self.experiments]
        if len(set(running)) != len(running):
            raise ValueError(f"experiments: names must differ, found {running}")
        limit = self.engine.max_seq_len
        for arm in self.arms:
            if arm.max_new_tokens is not None and arm.max_new_tokens >= limit:
                raise ValueError(
                    f"arm {arm.name!r}: max_new_tokens={arm.max_new_tokens} leaves no room for a prompt "
                    f"in engine.max_seq_len={limit}"
                )
        return self
