"""What an answer takes: time, tokens, money. Smaller is better; a failed request has none of them.

In a comparison times come from answers with one request in flight (`offline.alone_jobs`): with many in flight they are
mostly the time in the queue, which depends on the other arms.
"""

from dataclasses import dataclass
from math import nan

from graftwork.datasets.rows import DatasetRow
from graftwork.metrics import COMPLETION_TOKENS, LATENCY_MS, PROMPT_TOKENS, TTFT_MS, Metric
from graftwork.serving.evaluation.scorers.spec import CostSpec, ModelReply

_MS_PER_HOUR = 3_600_000


@dataclass(frozen=True)
class MeasureScorer:
    """Measures that the endpoint reports with each answer."""

    metrics: tuple[Metric, ...]
    needs_gold = False

    def check(self, row: DatasetRow) -> None:
        """Any row will do."""

    def score(self, reply: ModelReply) -> dict[str, float]:
        return {metric.name: _known(getattr(reply, metric.name)) for metric in self.metrics}


LATENCY = MeasureScorer((LATENCY_MS, TTFT_MS))
TOKENS = MeasureScorer((PROMPT_TOKENS, COMPLETION_TOKENS))


class CostScorer:
    """Price of 1,000 answers like this one."""

    needs_gold = False

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
        return {"cost": sum(price * _known(taken) for price, taken in parts if price)}


def _known(value: float | None) -> float:
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
