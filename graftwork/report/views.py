"""Views of the records in `schema`: panels, charts and rows with formatted numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graftwork.report import format as words
from graftwork.report.charts import Line, Mark, Scale, interval_track, line_chart, pair_track, share_bar, ticks
from graftwork.report.evaluation_schema import QuantizeReport
from graftwork.report.schema import (
    AdapterLatency,
    ArmCauses,
    ArmCost,
    ArmReport,
    CauseShare,
    CompareReport,
    DecisionCard,
    Difference,
    Lift,
    PlanRow,
    SampleAnswer,
    StageTime,
    StepSeries,
    SwapRecord,
    TrainRun,
)

Tick = tuple[float, str]
"""(percent, label)"""


@dataclass(frozen=True)
class ArmRow:
    """One arm in a panel."""

    name: str
    kind: str
    is_baseline: bool
    track: Markup
    value: str
    interval: str
    signature: str


@dataclass(frozen=True)
class MetricPanel:
    """All arms on one metric."""

    metric: str
    unit: str
    meaning: str
    advice: str
    groups: str
    """Arms that the tests do not tell apart; empty where they tell all apart."""
    rows: tuple[ArmRow, ...]


@dataclass(frozen=True)
class Chart:
    """A plot and the words around it."""

    plot: Markup
    x_name: str
    x_ticks: tuple[Tick, ...]
    y_name: str
    y_ticks: tuple[Tick, ...]


def panels(report: CompareReport) -> list[MetricPanel]:
    """The metrics of the advice (facts, form and both) as small multiples, the baseline marked in each."""
    advice = {found.metric: found for found in report.advice.metrics}
    return [
        MetricPanel(
            metric.name,
            metric.unit,
            metric.meaning,
            advice[metric.name].sentence,
            words.tied(advice[metric.name].groups),
            tuple(_row(arm, metric.name, report) for arm in report.arms),
        )
        for metric in report.metrics
        if metric.name in advice
    ]


def _row(arm: ArmReport, metric: str, report: CompareReport) -> ArmRow:
    score = arm.scores[metric]
    baseline = next(other for other in report.arms if other.name == report.baseline)
    title = f"{arm.name}: {words.score(score.value)} {words.interval(score.low, score.high)}\n{score.signature}"
    track = interval_track(
        Mark(score.value, score.low, score.high, arm.kind, title), Scale(0, 1), baseline.scores[metric].value
    )
    return ArmRow(
        arm.name,
        arm.kind,
        arm.name == report.baseline,
        track,
        words.score(score.value),
        words.interval(score.low, score.high),
        score.signature,
    )


def difference_track(difference: Difference, kind: str, reach: float = 1.0) -> Markup:
    """A difference and its interval between -reach and +reach, zero marked."""
    title = f"{difference.a} − {difference.b}: {words.signed_number(difference.value)}\n{difference.signature}"
    mark = Mark(difference.value, difference.low, difference.high, kind, title)
    return interval_track(mark, Scale(-reach, reach), reference=0.0)


def reach(differences: Sequence[Difference], report: CompareReport) -> float:
    """Return the end of a track of these differences: 1 for scores, the farthest bound for a measure."""
    kinds = {metric.name: metric.kind for metric in report.metrics}
    if not all(kinds[one.metric] == "measure" for one in differences) or not differences:
        return 1.0
    return max(max(abs(one.low), abs(one.high)) for one in differences) or 1.0


def scores_only(differences: Sequence[Difference], report: CompareReport) -> bool:
    """No measure is among them, so that all tracks go from -1 to +1."""
    measures = {metric.name for metric in report.metrics if metric.kind == "measure"}
    return not any(one.metric in measures for one in differences)


def differences_by_metric(report: CompareReport) -> list[tuple[str, list[Difference]]]:
    """The table against the baseline, metric by metric."""
    found = [(metric.name, [d for d in report.differences if d.metric == metric.name]) for metric in report.metrics]
    return [(name, some) for name, some in found if some]


def kinds(report: CompareReport) -> dict[str, str]:
    """Arm -> kind, for its colour and shape."""
    return {arm.name: arm.kind for arm in report.arms}


def precision_kinds(report: QuantizeReport) -> dict[str, str]:
    """`PRECISION/ARM` -> kind, for its colour: with an adapter or without."""
    return {
        f"{row.precision}/{arm.arm}": "finetune" if arm.adapter_version else "prompt"
        for row in report.precisions
        for arm in row.arms
    }


def headline(report: CompareReport) -> tuple[ArmReport, tuple[str, ...]]:
    """The arm that the verdict names as best on the primary metric, and the arms that no test tells from it."""
    found = next(one for one in report.advice.metrics if one.metric == report.primary)
    return next(arm for arm in report.arms if arm.name == found.best), tuple(
        name for name in found.tied if name != found.best
    )


def marks(answer: SampleAnswer, report: CompareReport) -> list[tuple[str, str | bool]]:
    """Return the scores of a sample answer on the metrics of the advice: right or wrong, or how much."""
    shown = {found.metric for found in report.advice.metrics}
    return [
        (
            metric.name,
            bool(answer.scores[metric.name]) if metric.kind == "binary" else words.score(answer.scores[metric.name]),
        )
        for metric in report.metrics
        if metric.name in shown and metric.name in answer.scores
    ]


def cause_name(cause: str) -> str:
    """A cause in words."""
    return {"all": "all", "use_of_context": "use of context"}.get(cause, cause)


def cause_tracks(card: DecisionCard) -> list[tuple[CauseShare, Markup]]:
    """Each cause's share with its interval and the line from which on it matters; those never seen are left out."""
    return [
        (
            cause,
            interval_track(
                Mark(
                    cause.share.value,
                    cause.share.low,
                    cause.share.high,
                    "latency",
                    f"{cause.share.count} of {cause.share.n}\n{cause.share.signature}",
                ),
                Scale(0, 1),
                card.min_share,
            ),
        )
        for cause in sorted(card.causes, key=lambda one: -one.share.value)
        if cause.share.count or cause.state == "open"
    ]


def lifted(card: DecisionCard) -> list[str]:
    """Return the causes that another arm could fix, all of them together first."""
    return list(dict.fromkeys(lift.cause for lift in card.lifts))


def lift_rows(card: DecisionCard) -> list[tuple[str, str, list[Lift]]]:
    """(arm, kind, its lifts in the order of `lifted`)."""
    arms = dict.fromkeys((lift.arm, lift.kind) for lift in card.lifts)
    return [(arm, kind, [lift for lift in card.lifts if lift.arm == arm]) for arm, kind in arms]


def arm_rows(card: DecisionCard) -> list[tuple[ArmCost, ArmCauses | None]]:
    """Return the cost of each arm, and its failures where they were probed."""
    causes = {one.arm: one for one in card.arms}
    return [(cost, causes.get(cost.arm)) for cost in card.costs]


def run_chart(run: TrainRun) -> Chart | None:
    """Training loss as a line, held-out loss as points."""
    lines = [Line(run.loss, "train", "training loss")] if run.loss else []
    lines += [Line(run.eval_loss, "eval", "held-out loss", dots=True)] if run.eval_loss else []
    return curves(lines, "optimizer step", "loss")


def series_chart(series: StepSeries) -> Chart | None:
    """A kind's own figure; None where no value is finite."""
    return curves([Line(series.points, "train", series.name)], "optimizer step", series.name, lowest=-math.inf)


def plan_tracks(rows: Sequence[PlanRow], what: str) -> list[tuple[PlanRow, Markup]]:
    """Predicted against actual, `what` being `bytes` or `s`; rows with neither are left out."""
    known = [(row, getattr(row, f"predicted_{what}"), getattr(row, f"actual_{what}")) for row in rows]
    known = [(row, predicted, actual) for row, predicted, actual in known if predicted or actual]
    top = max((value for _, *pair in known for value in pair if value), default=1.0)
    say = words.size if what == "bytes" else words.seconds
    return [
        (
            row,
            pair_track(
                predicted,
                actual,
                Scale(0, 1.05 * top),
                f"{row.stage}: predicted {say(predicted)}, actual {say(actual)}",
            ),
        )
        for row, predicted, actual in known
    ]


def stage_bars(stages: Sequence[StageTime]) -> list[tuple[StageTime, Markup]]:
    """Wall time as bars of one scale."""
    longest = max((stage.wall_s for stage in stages), default=0.0) or 1.0
    return [
        (
            stage,
            share_bar(
                [(stage.wall_s / longest, "bar-reused" if stage.reused else "bar-time", words.seconds(stage.wall_s))],
                f"{stage.stage}: {words.seconds(stage.wall_s)}",
            ),
        )
        for stage in stages
    ]


def latency_tracks(rows: Sequence[AdapterLatency]) -> list[tuple[AdapterLatency, Markup | None]]:
    """Median to 95th percentile of the whole answer's time, one scale for all adapters."""
    top = max((row.latency_ms.p95 for row in rows if row.latency_ms), default=1.0)
    return [(row, _latency_track(row, Scale(0, 1.05 * top))) for row in rows]


def swap_bar(swap: SwapRecord) -> Markup:
    """Answers of the old and of the new version."""
    total = sum(swap.answers_by_version.values()) or 1
    oldest_first = sorted(swap.answers_by_version.items(), key=lambda item: item[0] != swap.old_version)
    ages = {swap.old_version: "old", swap.new_version: "new"}
    parts = [
        (n / total, f"swap-{ages.get(version, 'other')}", f"{version}: {n} answers") for version, n in oldest_first
    ]
    return share_bar(parts, "answers by adapter version")


def _latency_track(row: AdapterLatency, scale: Scale) -> Markup | None:
    if row.latency_ms is None:
        return None
    p50, p95 = row.latency_ms.p50, row.latency_ms.p95
    title = f"{row.name}: median {words.milliseconds(p50)}, p95 {words.milliseconds(p95)}, n={row.latency_ms.n}"
    return interval_track(Mark(p50, p50, p95, "latency", title), scale, None)


def curves(
    lines: Sequence[Line], x_name: str, y_name: str, lowest: float = 0.0, highest: float = math.inf
) -> Chart | None:
    """Finite points of some curves; what lies above `highest` is drawn on the upper edge."""
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    steps = [step for step, _ in points]
    losses = [min(loss, highest) for _, loss in points if math.isfinite(loss)] or [0.0]
    spread = (max(losses) - min(losses)) or 1.0
    x, y = Scale(0, max(*steps, 1)), Scale(max(lowest, min(losses) - 0.08 * spread), max(losses) + 0.05 * spread)
    finite = [
        Line([(a, min(b, y.high)) for a, b in line.points if math.isfinite(b)], line.style, line.title, line.dots)
        for line in lines
    ]
    plot = line_chart([line for line in finite if line.points], x, y, f"{y_name} by {x_name}")
    return Chart(
        plot,
        x_name,
        tuple((x(t), f"{t:g}") for t in ticks(x.low, x.high)),
        y_name,
        tuple((y(t), f"{t:.3g}") for t in ticks(y.low, y.high)),
    )
