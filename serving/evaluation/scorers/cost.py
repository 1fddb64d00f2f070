"""Scorers `latency`, `tokens` and `cost`. Smaller is better; a failed request has no value.

In a comparison times come from answers with one request in flight (`answers.alone_jobs`): with many in flight they
are mostly the time in the queue, which depends on the other arms.
"""

from math import nan
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow
from graftwork.metrics import COMPLETION_TOKENS, LATENCY_MS, PROMPT_TOKENS, TTFT_MS, Metric
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers.protocol import ModelReply, ScoreFunction, Scorer

_MS_PER_HOUR = 3_600_000


class LatencySpec(Spec):
    """Milliseconds to the first and to the last token. A comparison times each arm alone, one request in flight, on a
    few questions, and tests no difference.
    """

    kind: Literal["latency"]
    needs_gold: ClassVar[bool] = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("latency_ms", "ttft_ms")

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return LATENCY


class TokensSpec(Spec):
    """Tokens of the prompt and of the answer."""

    kind: Literal["tokens"]
    needs_gold: ClassVar[bool] = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("prompt_tokens", "completion_tokens")

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return TOKENS


def _measures(metrics: tuple[Metric, ...]) -> Scorer:
    """Measures that the endpoint reports with each answer."""
    return ScoreFunction(
        metrics, lambda reply: {metric.name: _or_nan(getattr(reply, metric.name)) for metric in metrics}
    )


LATENCY = _measures((LATENCY_MS, TTFT_MS))
TOKENS = _measures((PROMPT_TOKENS, COMPLETION_TOKENS))


class CostSpec(Spec):
    """Cost of 1,000 answers by these prices."""

    kind: Literal["cost"]
    needs_gold: ClassVar[bool] = False
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    per_1k_prompt_tokens: float = Field(default=0.0, ge=0)
    per_1k_completion_tokens: float = Field(default=0.0, ge=0)
    per_replica_hour: float = Field(default=0.0, ge=0)
    """Paid for the time that an answer takes, divided by the answers that a replica gives at once."""
    answers_at_once: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if not (self.per_1k_prompt_tokens or self.per_1k_completion_tokens or self.per_replica_hour):
            raise ValueError("cost needs a price: per_1k_prompt_tokens, per_1k_completion_tokens or per_replica_hour")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("cost",)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return CostScorer(self)


class CostScorer:
    """Price of 1,000 answers like this one."""

    def __init__(self, spec: CostSpec) -> None:
        self._spec = spec
        unit = f"{spec.currency} per 1,000 answers"
        self.by_time = bool(spec.per_replica_hour)
        self.metrics = (Metric("cost", unit, "lower", "measure", f"{unit}: {_prices(spec)}."),)

    def check(self, row: DatasetRow) -> None:
        """Any row will do."""

    def score(self, reply: ModelReply) -> dict[str, float]:
        spec = self._spec
        parts = (
            (spec.per_1k_prompt_tokens, reply.prompt_tokens),
            (spec.per_1k_completion_tokens, reply.completion_tokens),
            (1000 * spec.per_replica_hour / _MS_PER_HOUR / spec.answers_at_once, reply.latency_ms),
        )
        return {"cost": sum(price * _or_nan(taken) for price, taken in parts if price)}


def _or_nan(value: float | None) -> float:
    return nan if value is None else float(value)


def _prices(spec: CostSpec) -> str:
    said = [
        f"{price:g} {spec.currency} per {what}"
        for price, what in (
            (spec.per_1k_prompt_tokens, "1,000 prompt tokens"),
            (spec.per_1k_completion_tokens, "1,000 answer tokens"),
            (spec.per_replica_hour, f"replica and hour, {spec.answers_at_once} answers at once"),
        )
        if price
    ]
    return ", ".join(said)
