"""Table of the scorers that a spec may name under `scorers:`, and all scorers of a spec as one.

`- exact` is short for `- {kind: exact}`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError
from graftwork.metrics import Metric
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers.choice import ChoiceScorer, ChoiceSpec
from graftwork.serving.evaluation.scorers.cost import LATENCY, CostScorer, CostSpec, LatencySpec, TokensSpec
from graftwork.serving.evaluation.scorers.json_answer import FieldF1Spec, FieldsSpec, JsonSchemaSpec
from graftwork.serving.evaluation.scorers.overlap import OverlapSpec
from graftwork.serving.evaluation.scorers.plugin import OwnSpec
from graftwork.serving.evaluation.scorers.protocol import ModelReply, Scorer, ScorerKind
from graftwork.serving.evaluation.scorers.sql import SqlSpec
from graftwork.serving.evaluation.scorers.text_match import ExactScorer, ExactSpec, QaSpec, RegexSpec
from graftwork.serving.evaluation.scorers.tool_calls import ToolCallsSpec


def _expand_short_form(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


_AnySpec = (
    FieldsSpec
    | ExactSpec
    | QaSpec
    | FieldF1Spec
    | JsonSchemaSpec
    | RegexSpec
    | SqlSpec
    | OverlapSpec
    | ChoiceSpec
    | ToolCallsSpec
    | LatencySpec
    | TokensSpec
    | CostSpec
    | OwnSpec
)
ScorerSpec = Annotated[_AnySpec, Field(discriminator="kind"), BeforeValidator(_expand_short_form)]


class Scorers:
    """All scorers of a spec as one. Pure and without state: any thread may score."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        """Raises ConfigError where two scorers have a metric of the same name."""
        self._scorers = tuple(scorers)
        self.metrics: tuple[Metric, ...] = tuple(metric for scorer in scorers for metric in scorer.metrics)
        names = [metric.name for metric in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"scorers: {twice[0]!r}",
                "two scorers have this name",
                "a metric has one name",
                "give one of them another `name`",
            )

    @property
    def choices(self) -> tuple[ChoiceScorer, ...]:
        """Scorers that need likelihoods of options from the endpoint."""
        return tuple(scorer for scorer in self._scorers if isinstance(scorer, ChoiceScorer))

    @property
    def tested(self) -> tuple[Metric, ...]:
        """Metrics of which a comparison makes verdicts: a time is measured on a few questions and only reported."""
        return tuple(metric for metric in self.metrics if metric not in LATENCY.metrics)

    @property
    def exact(self) -> tuple[ExactScorer, ...]:
        """Scorers that compare the whole text with the right text."""
        return tuple(scorer for scorer in self._scorers if isinstance(scorer, ExactScorer))

    @property
    def needs_times(self) -> bool:
        """A scorer needs the time of answers: `latency`, or `cost` by the hour."""
        return any(scorer is LATENCY or (isinstance(scorer, CostScorer) and scorer.by_time) for scorer in self._scorers)

    def check(self, rows: Sequence[DatasetRow]) -> None:
        """Raises DataError for the first row whose answers a scorer cannot score."""
        for row in rows:
            for scorer in self._scorers:
                scorer.check(row)

    def score(self, reply: ModelReply) -> dict[str, float]:
        """Return one value for each metric, in the order of `metrics`."""
        return {name: value for scorer in self._scorers for name, value in scorer.score(reply).items()}

    def failed_scores(self) -> dict[str, float]:
        """Return the scores of a request without an answer: 0, and no time, tokens or cost."""
        return {metric.name: float("nan") if metric.kind == "measure" else 0.0 for metric in self.metrics}


def load_scorers(specs: Sequence[ScorerKind], schema: AnswerSchema | None = None, *, gold: bool = True) -> Scorers:
    """Build the scorers in order. schema: the spec's answer_schema. gold=False: for traffic without right answers.

    Raises ConfigError: a scorer that lacks its schema, its gold, its package or its entry point; StorageError.
    """
    for spec in specs:
        if spec.needs_gold and not gold:
            raise ConfigError(
                f"scorers: kind={spec.kind!r}",
                "it needs the right answer",
                "live traffic has no gold",
                f"score it with {' or '.join(_kinds_without_gold())}",
            )
    return Scorers([spec.build(schema) for spec in specs])


def _kinds_without_gold() -> list[str]:
    """Kinds that score live traffic, in the order of the table."""
    return [
        kind
        for spec in get_args(_AnySpec)
        if not spec.needs_gold
        for kind in get_args(spec.model_fields["kind"].annotation)
    ]
