"""Spec of a quantization run: precisions, questions, arms, and the losses that are acceptable."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graftwork.base.source import BaseSpec
from graftwork.config import Spec
from graftwork.planning.hardware import AUTO, Gpus, resolved_count
from graftwork.quantization import OF_ALL_BASES, Precision
from graftwork.serving.spec import ArmSpec, EngineSpec
from graftwork.storage.store import DEFAULT_ROOT, NAME_PATTERN


class TextSpec(Spec):
    """The text that perplexity is taken on, and the windows it is read in."""

    uri: str | None = None
    """Plain text: a path, `file://`, `s3://` or `recipe://NAME/FILE`. null: the questions and gold answers of `eval`,
    rendered by the base's chat template; no adapter of the recipes has seen them."""
    max_tokens: int = Field(default=8192, ge=2)
    """First N tokens of the text."""
    window: int = Field(default=512, ge=2)
    """Tokens of one forward pass."""
    stride: int = Field(default=256, ge=1)
    """Tokens from one window's start to the next one's: each token is scored once, with window - stride tokens before
    it at least (the first window's own tokens have fewer)."""

    @model_validator(mode="after")
    def _windows_meet(self) -> Self:
        if self.stride > self.window:
            raise ValueError(f"stride={self.stride} skips tokens between windows of {self.window}")
        return self


class SpeedSpec(Spec):
    """Timing of decoding: `rounds` times N concurrent requests, from the first token of the last one on."""

    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 32)
    """Requests at once; the recommendation looks at the last."""
    prompt_tokens: int = Field(default=64, ge=1)
    new_tokens: int = Field(default=24, ge=2)
    """Tokens of the last request; earlier ones answer a little longer, so that all decode together."""
    rounds: int = Field(default=3, ge=1)


class QuantizeSpec(Spec):
    """The base at each precision, each in a process of its own, and the smallest one that is good enough."""

    kind: Literal["quantize"] = "quantize"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    base: BaseSpec
    precisions: tuple[Precision, ...] = OF_ALL_BASES
    reference: Precision = "fp32"
    """Precision that the others are compared with, question by question."""
    eval: str
    """JSONL of questions with `id` and `gold`: a path, `file://`, `s3://` or `recipe://`."""
    limit: int | None = Field(default=None, ge=1)
    """Take the first N rows; null takes all."""
    answer_schema: str
    """JSON schema of a valid answer: a path or `recipe://NAME/schema.json`."""
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=1)]
    """Arms that answer at each precision, with an adapter or without."""
    metric: Literal["facts", "form", "both", "field_accuracy"] = "both"
    """The score that a precision must keep."""
    margin: float = Field(default=0.03, gt=0, lt=1)
    """The loss of that score that is allowed: the paired interval's lower end must lie above it."""
    min_speed: float = Field(default=0.5, ge=0)
    """Decoding speed that is needed, as a share of the reference's."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Two-sided error rate of the intervals and of each family of tests (Holm within a metric)."""
    text: TextSpec = TextSpec()
    speed: SpeedSpec = SpeedSpec()
    engine: EngineSpec = EngineSpec()
    num_cpus: float = Field(default=2.0, gt=0)
    num_gpus: Gpus = AUTO
    """GPUs of the process that measures; 0 computes on the CPU. auto: 1 where the target has GPUs, else 0."""
    seed: int = 0

    @property
    def gpus(self) -> float:
        """GPUs of the process that measures."""
        return resolved_count(self.num_gpus)

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        if len(set(self.precisions)) != len(self.precisions) or len(self.precisions) < 2:
            raise ValueError(f"precisions: at least two different ones, found {list(self.precisions)}")
        if self.reference not in self.precisions:
            raise ValueError(f"reference={self.reference!r} is none of the precisions {list(self.precisions)}")
        if self.engine.kind != "graftwork":
            raise ValueError(f"engine.kind={self.engine.kind!r}: precisions are measured on engine.kind='graftwork'")
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: names must differ, found {names}")
        return self

    @model_validator(mode="after")
    def _all_decode_at_once(self) -> Self:
        if self.speed.prompt_tokens > self.engine.prefill_tokens:
            raise ValueError(
                f"speed.prompt_tokens={self.speed.prompt_tokens} pass engine.prefill_tokens="
                f"{self.engine.prefill_tokens}: the first request would end before the last one begins"
            )
        if max(self.speed.batches) > self.engine.max_batch:
            raise ValueError(
                f"speed.batches={list(self.speed.batches)} do not fit engine.max_batch={self.engine.max_batch}"
            )
        longest = self.speed.prompt_tokens + self.speed.new_tokens + max(self.speed.batches)
        if longest > self.engine.max_seq_len:
            raise ValueError(
                f"speed: {longest} tokens a request do not fit engine.max_seq_len={self.engine.max_seq_len}"
            )
        if max(self.speed.batches) * longest > self.engine.kv_tokens * 3 // 4:
            raise ValueError(
                f"speed: {max(self.speed.batches)} requests of {longest} tokens do not fit "
                f"engine.kv_tokens={self.engine.kv_tokens} at once (a quarter is the prefix cache's)"
            )
        return self
