"""`scorers:` of a spec -> what scores each answer."""

from collections.abc import Sequence

from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError
from graftwork.metrics import Metric
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers.choice import ChoiceScorer
from graftwork.serving.evaluation.scorers.cost import LATENCY, TOKENS, CostScorer
from graftwork.serving.evaluation.scorers.exact import (
    ExactScorer,
    FieldF1Scorer,
    FieldsScorer,
    JsonSchemaScorer,
    QaScorer,
    RegexScorer,
)
from graftwork.serving.evaluation.scorers.overlap import OverlapScorer, RougeScorer
from graftwork.serving.evaluation.scorers.plugin import PluginScorer
from graftwork.serving.evaluation.scorers.spec import (
    ChoiceSpec,
    CostSpec,
    ExactSpec,
    FieldF1Spec,
    FieldsSpec,
    JsonSchemaSpec,
    LatencySpec,
    ModelReply,
    OverlapSpec,
    OwnSpec,
    QaSpec,
    RegexSpec,
    Scorer,
    ScorerSpec,
    SqlSpec,
    TokensSpec,
)
from graftwork.serving.evaluation.scorers.sql import SqlScorer


class Scorers:
    """All scorers of a spec as one. Pure and without state: any thread may score."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        """Raises ConfigError where two measure by the same name."""
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
        """Those that need likelihoods of options from the endpoint."""
        return tuple(scorer for scorer in self._scorers if isinstance(scorer, ChoiceScorer))

    @property
    def tested(self) -> tuple[Metric, ...]:
        """Metrics of which a comparison makes verdicts: a time is measured on a few questions and only reported."""
        return tuple(metric for metric in self.metrics if metric not in LATENCY.metrics)

    @property
    def exact(self) -> tuple[ExactScorer, ...]:
        """Those that want the right text and nothing else."""
        return tuple(scorer for scorer in self._scorers if isinstance(scorer, ExactScorer))

    @property
    def needs_times(self) -> bool:
        """A scorer needs the time of answers: `latency`, or `cost` by the hour."""
        return any(scorer is LATENCY or (isinstance(scorer, CostScorer) and scorer.by_time) for scorer in self._scorers)

    def check(self, rows: Sequence[DatasetRow]) -> None:
        """Raises DataError for the first row that a scorer cannot hold an answer against."""
        for row in rows:
            for scorer in self._scorers:
                scorer.check(row)

    def score(self, reply: ModelReply) -> dict[str, float]:
        """A value a metric, in the order of `metrics`."""
        return {name: value for scorer in self._scorers for name, value in scorer.score(reply).items()}

    def failed_scores(self) -> dict[str, float]:
        """What a request without an answer scores: 0, and no time, tokens or cost."""
        return {metric.name: float("nan") if metric.kind == "measure" else 0.0 for metric in self.metrics}


def load_scorers(specs: Sequence[ScorerSpec], schema: AnswerSchema | None = None, *, gold: bool = True) -> Scorers:
    """The scorers in order. schema: the spec's answer_schema. gold=False: for traffic whose right answers are unknown.

    Raises ConfigError: a scorer that lacks its schema, its gold, its package or its entry point; StorageError.
    """
    made = [_make(spec, schema) for spec in specs]
    for spec, scorer in zip(specs, made, strict=True):
        if scorer.needs_gold and not gold:
            raise ConfigError(
                f"scorers: kind={spec.kind!r}",
                "it needs the right answer",
                "live traffic has no gold",
                "score it with json_schema, regex, latency, tokens, cost or own",
            )
    return Scorers(made)


def _make(spec: ScorerSpec, schema: AnswerSchema | None) -> Scorer:
    match spec:
        case FieldsSpec():
            return FieldsScorer(_need(schema, "fields"))
        case JsonSchemaSpec():
            own = AnswerSchema.load(spec.json_schema) if spec.json_schema else _need(schema, "json_schema")
            return JsonSchemaScorer(spec.name, own)
        case ExactSpec():
            return ExactScorer(spec)
        case QaSpec():
            return QaScorer(spec)
        case FieldF1Spec():
            return FieldF1Scorer()
        case RegexSpec():
            return RegexScorer(spec)
        case SqlSpec():
            return SqlScorer(spec)
        case OverlapSpec():
            return RougeScorer(spec) if spec.kind == "rouge" else OverlapScorer(spec, spec.kind)
        case ChoiceSpec():
            return ChoiceScorer(spec)
        case LatencySpec():
            return LATENCY
        case TokensSpec():
            return TOKENS
        case CostSpec():
            return CostScorer(spec)
        case OwnSpec():
            return PluginScorer(spec)


def _need(schema: AnswerSchema | None, kind: str) -> AnswerSchema:
    if schema is None:
        raise ConfigError(
            f"scorers: kind={kind!r}",
            "there is no schema",
            "it holds answers against answer_schema",
            "set answer_schema",
        )
    return schema
