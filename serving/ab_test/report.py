"""Builder of the `ExperimentReport` from the log, in one pass with one batch in memory. Runs in the driver."""

from collections.abc import Iterable, Sequence
from typing import Any

from graftwork.metrics import signature
from graftwork.report import format as words
from graftwork.report.evaluation_schema import (
    ContrastState,
    ExperimentReport,
    OnlineArm,
    OnlineContrast,
    OnlineEvent,
    OnlineGuardrail,
    OnlinePoint,
)
from graftwork.serving.ab_test.guardrails import GuardrailState
from graftwork.serving.ab_test.log_reader import ExperimentLog, LogColumns, columns_of_batch
from graftwork.serving.ab_test.monitor import ArmContrast, Monitor, MonitorState
from graftwork.serving.ab_test.spec import GuardrailSpec, OnlineRules

_EVENTS = 200
"""Events that a report holds at most."""


def analyse_log(name: str, log: ExperimentLog, rules: OnlineRules) -> ExperimentReport:
    """The verdict on a whole log. What of it is damaged, or stands twice, is in the notes. Raises StorageError."""
    report = analyse(name, log.batches(), rules)
    health = log.health
    notes = [f"{words.count(health.duplicates)} rows stood in the log twice; they count once."] * (
        health.duplicates > 0
    )
    notes += [f"Damaged, so no row of it counts: {segment}." for segment in health.damaged]
    return report.model_copy(update={"notes": (*notes, *report.notes)})


def analyse(name: str, batches: Iterable[Any], rules: OnlineRules) -> ExperimentReport:
    """The verdict on the rows of some pyarrow RecordBatches (see `log_columns`), which are read once, in order.

    The same rows give the same bytes, however they are cut into batches.
    """
    monitor, log = Monitor(rules), _Log()
    for batch in batches:
        columns = columns_of_batch(batch, monitor.numbers)
        log.see(columns)
        monitor.ingest(columns)
    return report_of(name, monitor, log)


class _Log:
    """Counts of the log itself that the report shows."""

    def __init__(self) -> None:
        self.rows = 0
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.events: list[OnlineEvent] = []

    def see(self, columns: LogColumns) -> None:
        if len(columns):
            self.rows += len(columns)
            first, last = min(columns.at), max(columns.at)
            self.first_at = first if self.first_at is None else min(self.first_at, first)
            self.last_at = last if self.last_at is None else max(self.last_at, last)
        if "event" in columns.kind and len(self.events) < _EVENTS:
            rows = zip(columns.kind, columns.at, columns.event, columns.detail, strict=True)
            self.events += [
                OnlineEvent(at=at, event=event or "", detail=detail or "")
                for kind, at, event, detail in rows
                if kind == "event"
            ]


def report_of(name: str, monitor: Monitor, log: "_Log") -> ExperimentReport:
    """The records of what a monitor has seen."""
    rules, state = monitor.rules, monitor.state()
    contrasts = tuple(
        _contrast(one, contrast, rules) for one, contrast in zip(state.contrasts, monitor.contrasts, strict=True)
    )
    return ExperimentReport(
        name=name,
        mode=rules.mode,
        metric=rules.metric,
        kind=rules.kind,
        better=rules.better,
        control=rules.control,
        alpha=rules.alpha,
        margin=rules.margin,
        window_s=rules.window_s,
        deadline_s=rules.deadline_s,
        rows=log.rows,
        first_at=log.first_at,
        last_at=log.last_at,
        arms=_arms(state, monitor),
        contrasts=contrasts,
        guardrails=tuple(_guardrail(one, watch) for one, watch in zip(state.guardrails, monitor.watched, strict=True)),
        srm_e_value=state.srm_e_value,
        srm_bound=1 / rules.srm_alpha,
        blocked=state.blocked,
        cut=state.cut,
        left_out=state.left_out,
        events=tuple(log.events[:_EVENTS]),
        notes=_waiting(state, rules),
        sentence=_sentence(state, contrasts),
    )


def _waiting(state: MonitorState, rules: OnlineRules) -> tuple[str, ...]:
    """Return a note on the units whose outcome the log does not hold yet."""
    if not state.waiting:
        return ()
    unit = "Copies" if rules.mode == "shadow" else "Units"
    return (
        f"{unit} that are not counted yet: {words.count(state.waiting)}. An answer or score, theirs or that of one "
        "assigned earlier, is pending or was when the log ended.",
    )


def _sentence(state: MonitorState, contrasts: Sequence[OnlineContrast]) -> str:
    cut = f"{', '.join(state.cut)} broke a guardrail and is to be cut. " if state.cut else ""
    if state.blocked:
        return f"{cut}No conclusion: {state.blocked}."
    return cut + " ".join(one.sentence for one in contrasts)


def _arms(state: MonitorState, monitor: Monitor) -> tuple[OnlineArm, ...]:
    rules, weights = monitor.rules, monitor.weights
    return tuple(
        OnlineArm(
            name=one.arm,
            weight=weights.get(one.arm),
            units=one.units,
            counted=one.counted,
            scored=one.scored,
            mean=one.mean,
            answers=one.answers,
            errors=one.errors,
            cut=one.arm in state.cut,
            signature=signature(rules.metric, one.counted, {"arm": one.arm, "mean": "plain", **_recipe(rules)}),
        )
        for one in state.arms
    )


def _recipe(rules: OnlineRules) -> dict[str, object]:
    return {"mode": rules.mode, "unit": "first" if not rules.window_s else f"{rules.window_s:g}s"}


def _contrast(one: ContrastState, contrast: ArmContrast, rules: OnlineRules) -> OnlineContrast:
    sequence = "betting" if rules.kind == "bounded" else "asymptotic"
    recipe = {
        "arm": one.arm,
        "vs": one.control,
        "score": "aipw" if rules.mode == "split" else "paired",
        "cs": sequence,
        "level": f"{one.level:g}",
        **_recipe(rules),
    }
    path = tuple(
        OnlinePoint(n=n, estimate=estimate, low=low, high=high)
        for n, estimate, low, high in map(contrast.scaled, contrast.history)
    )
    return OnlineContrast(
        **one.model_dump(),
        sentence=_verdict_text(one, rules),
        path=path,
        signature=signature(rules.metric, one.n, recipe),
    )


def _verdict_text(one: ContrastState, rules: OnlineRules) -> str:
    """One sentence with the numbers and n."""
    unit = "prompts" if rules.mode == "shadow" else "units"
    n = f"n={words.count(one.n)} {unit}"
    if one.estimate is None:
        return f"Nothing is known of {one.arm} against {one.control} on {rules.metric} yet."
    numbers = f"{_signed_text(one.estimate)} [{_signed_text(one.low)}, {_signed_text(one.high)}] on {rules.metric}, {n}"
    if one.verdict == "undecided":
        more = "" if one.n_needed is None else f"; about {words.count(one.n_needed)} {unit} would decide"
        return f"{one.arm} against {one.control} is undecided: {numbers}{more}."
    if one.verdict == "equivalent":
        return f"{one.arm} and {one.control} differ by less than {rules.margin:g}: {numbers}."
    return f"{one.arm} is {one.verdict} than {one.control}: {numbers}."


def _signed_text(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _guardrail(one: GuardrailState, rule: GuardrailSpec) -> OnlineGuardrail:
    bounds = {
        "errors": "failed answers",
        "latency": f"answers slower than {rule.bound_ms:g} ms" if rule.bound_ms else "",
        "schema_invalid": f"answers below 1 on {rule.score}",
        "empty_context": "answers without passages",
        "fairness_gap": f"gap on {rule.score} between {' and '.join(rule.groups or ())}",
    }
    return OnlineGuardrail(
        arm=one.arm,
        kind=one.kind,
        says=f"{bounds[one.kind]}: at most {rule.limit:g}",
        n=one.n,
        value=one.value,
        limit=one.limit,
        e_value=one.e_value,
        bound=1 / rule.alpha,
        broken_at=one.broken_at,
        signature=signature(one.kind, one.n, {"arm": one.arm, "limit": rule.limit, "alpha": rule.alpha}),
    )
