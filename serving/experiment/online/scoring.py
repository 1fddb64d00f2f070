"""What the rows of a running experiment are scored and judged by, made from its spec."""

from graftwork.answers.schema import AnswerSchema
from graftwork.errors import ConfigError, GraftworkError
from graftwork.serving.experiment.online.log_row import LogRow
from graftwork.serving.experiment.online.rules import MEASURES, Guardrail, OnlineRules
from graftwork.serving.experiment.online.spec import ExperimentSpec
from graftwork.serving.experiment.scorers.load import Scorers, load_scorers
from graftwork.serving.experiment.scorers.reply import ModelReply


def scorers_of(spec: ExperimentSpec) -> Scorers:
    """Raises GraftworkError for a scorer that can't work on live traffic."""
    schema = AnswerSchema.load(spec.answer_schema) if spec.answer_schema else None
    return load_scorers(spec.scorers, schema, gold=False)


def score_answer(row: LogRow, scorers: Scorers) -> LogRow:
    """The answer with its scores; a failed one has none. Where a scorer fails the answer has none, and says so."""
    if row.kind != "answer" or row.error is not None or row.output is None:
        return row
    reply = ModelReply(
        row.output, prompt_tokens=row.prompt_tokens, completion_tokens=row.completion_tokens, ttft_ms=row.ttft_ms,
        latency_ms=row.latency_ms,
    )  # fmt: skip
    try:
        scores = {name: value for name, value in scorers.score(reply).items() if value == value}
    except GraftworkError as error:
        return row.model_copy(update={"detail": f"not scored: {error.subject}: {error.problem}"})
    return row.model_copy(update={"scores": scores})


def rules_of(spec: ExperimentSpec) -> OnlineRules:
    """The rules for the monitor. Raises ConfigError."""
    primary = spec.primary
    if primary.kind != "bounded" and primary.name not in (*MEASURES, *(one.name for one in scorers_of(spec).metrics)):
        raise ConfigError(
            f"primary.kind={primary.kind}", f"{primary.name} comes by feedback",
            "a unit without feedback counts with the middle of low..high", "set kind: bounded, low and high",
        )  # fmt: skip
    guardrails = tuple(
        Guardrail(g.kind, g.limit, bound_ms=g.bound_ms, score=g.score, groups=g.groups, arms=g.arms, alpha=g.alpha)
        for g in spec.guardrails
    )
    return OnlineRules(
        arms=tuple(arm.name for arm in spec.arms), control=spec.control, metric=primary.name, weights=spec.weights,
        kind=primary.kind, low=primary.low, high=primary.high, better=primary.better, alpha=spec.alpha,
        margin=spec.margin, mode=spec.mode, window_s=primary.window_s, deadline_s=primary.deadline_s,
        guardrails=guardrails,
    )  # fmt: skip
