"""Records -> what the page shows: panels, charts and rows, with every number already in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graftwork.metrics import FAIR_AT_ZERO
from graftwork.report import format as words
from graftwork.report.charts import (
    Line,
    Mark,
    Scale,
    band_chart,
    interval_track,
    line_chart,
    pair_track,
    share_bar,
    ticks,
)
from graftwork.report.evaluation_schema import (
    Change,
    CurveReport,
    ExperimentReport,
    Level,
    OnlineContrast,
    OnlineGuardrail,
    OutcomesReport,
    PairedTest,
    QuantizeReport,
    Rebased,
)
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
    MetricInfo,
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
    """How far a track of these differences goes: 1 for scores, the farthest bound for a measure."""
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
    """What a sample answer scored on the metrics of the advice: right or wrong, or how much."""
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
    """The causes that another arm could mend, all of them together first."""
    return list(dict.fromkeys(lift.cause for lift in card.lifts))


def lift_rows(card: DecisionCard) -> list[tuple[str, str, list[Lift]]]:
    """(arm, kind, its lifts in the order of `lifted`)."""
    arms = dict.fromkeys((lift.arm, lift.kind) for lift in card.lifts)
    return [(arm, kind, [lift for lift in card.lifts if lift.arm == arm]) for arm, kind in arms]


def arm_rows(card: DecisionCard) -> list[tuple[ArmCost, ArmCauses | None]]:
    """What each arm takes, and its failures where they were probed."""
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
    parts = [(n / total, f"swap-{_age(version, swap)}", f"{version}: {n} answers") for version, n in oldest_first]
    return share_bar(parts, "answers by adapter version")


def _age(version: str, swap: SwapRecord) -> str:
    return {swap.old_version: "old", swap.new_version: "new"}.get(version, "other")


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


# An online experiment's record -> what the page shows: the effect and its sequence as the log grew, and words.


def path_chart(report: ExperimentReport, contrast: OnlineContrast) -> Chart | None:
    """Estimate and confidence sequence by n (log axis), with 0 and the margin; None before there is an interval."""
    points = [p for p in contrast.path if math.isfinite(p.low) and math.isfinite(p.high)]
    if len(points) < 2:
        return None
    shown = _reach(report, contrast, [abs(p.estimate) for p in points])
    x, y = Scale(points[0].n, points[-1].n, log=True), Scale(-shown, shown)
    clipped = [(p.n, max(-shown, p.low), min(shown, max(-shown, p.estimate)), min(shown, p.high)) for p in points]
    title = f"{contrast.arm} − {contrast.control} on {report.metric}, n={points[-1].n}"
    plot = band_chart(clipped, x, y, {0.0: "zero", report.margin: "margin", -report.margin: "margin"}, title)
    unit = "prompts" if report.mode == "shadow" else "units"
    x_ticks = tuple((x(n), words.count(n)) for n in _powers(x))
    y_ticks = tuple((y(t), f"{t:+g}" if t else "0") for t in ticks(y.low, y.high, 5))
    return Chart(plot, f"{unit} so far (log scale)", x_ticks, f"{contrast.arm} − {contrast.control}", y_ticks)


def effect_track(report: ExperimentReport, contrast: OnlineContrast) -> Markup:
    """The last interval on one line, zero marked."""
    reach = _reach(report, contrast, [])
    low, high = max(-reach, contrast.low), min(reach, contrast.high)
    title = f"{contrast.sentence}\n{contrast.signature}"
    return interval_track(Mark(contrast.estimate or 0.0, low, high, "rag", title), Scale(-reach, reach), reference=0.0)


def estimator(mode: str) -> str:
    """Name what a contrast's estimate is: the mean of scores weighted by each unit's chance of its arm, or of pairs.

    A split's estimate is not the difference of the arms' plain means, which mislead where weights move.
    """
    return "paired difference" if mode == "shadow" else "weighted difference"


def evidence(value: float) -> str:
    """An e-value: how many to one."""
    if not math.isfinite(value) or value >= 1e6:
        return "> 10⁶"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def signed(value: float | None) -> str:
    """A difference with three decimals, since intervals of large logs are narrow."""
    return words.NONE if value is None else f"{value:+.3f}".replace("-", "−")


def effect_interval(contrast: OnlineContrast) -> str:
    """The confidence sequence now."""
    if not math.isfinite(contrast.low):
        return "none before n=100"
    return f"[{signed(contrast.low)}, {signed(contrast.high)}]"


def guard_state(guardrail: OnlineGuardrail) -> str:
    """The badge's words."""
    return "within" if guardrail.broken_at is None else f"broken at n={words.count(guardrail.broken_at)}"


def _reach(report: ExperimentReport, contrast: OnlineContrast, seen: Sequence[float]) -> float:
    """Far enough for the last interval, the margin and the later estimates; wide early intervals are cut."""
    late = seen[len(seen) // 3 :]
    known = [abs(v) for v in (contrast.low, contrast.high, contrast.estimate or 0.0) if math.isfinite(v)]
    return 1.6 * max([report.margin, *known, *late])


def _powers(scale: Scale) -> list[int]:
    found = [step * 10**power for power in range(9) for step in (1, 3)]
    return [n for n in found if scale.low <= n <= scale.high]


# Outcomes -> what the page shows: a line for each metric, before and after on one scale.


PARTS = {
    "task": "The task",
    "text": "General text",
    "choices": "Multiple choice",
    "instructions": "Instructions outside the task",
    "fairness": "Fairness",
    "pairs": "One name against another",
}
WORDS = {"better": "gained", "worse": "lost", "equivalent": "the same", "undecided": "not told apart"}


@dataclass(frozen=True)
class ChangeRow:
    """One change, drawn."""

    change: Change
    before: Markup
    after: Markup
    axis: tuple[Tick, ...]


def format_count(test: PairedTest) -> str:
    """`24 in 9 clusters`: the questions, and what of them is independent where that is fewer."""
    return f"{test.questions}" if test.n == test.questions else f"{test.questions} in {test.n} clusters"


def direction(info: MetricInfo) -> str:
    """Which way is better."""
    return "nearer to 0" if info.name in FAIR_AT_ZERO else info.better


def part_rows(report: OutcomesReport) -> list[tuple[str, list[ChangeRow]]]:
    """(heading, rows) of each part."""
    parts = dict.fromkeys(change.part for change in report.changes)
    return [
        (PARTS[part], [_outcome_row(change, report) for change in report.changes if change.part == part])
        for part in parts
    ]


def _outcome_row(change: Change, report: OutcomesReport) -> ChangeRow:
    same = [one for one in report.changes if one.metric == change.metric and one.part == change.part]
    info = next(info for info in report.metrics if info.name == change.metric)
    scale = level_scale(
        [level for one in same for level in (one.before, one.after)],
        share=info.kind == "binary" or (info.kind == "graded" and info.better == "higher"),
    )
    sides = [
        interval_track(Mark(level.value, level.low, level.high, style, title(level)), scale, None)
        for level, style in ((change.before, "prompt"), (change.after, "finetune"))
    ]
    axis = tuple((scale(at), f"{at:g}".replace("-", "−")) for at in ticks(scale.low, scale.high, 3))
    return ChangeRow(change, sides[0], sides[1], axis)


def title(level: Level) -> str:
    """`0.42 [0.31, 0.54]`."""
    return f"{words.number(level.value)} {words.numbers(level.low, level.high)}".replace("-", "−")


def level_scale(levels: Sequence[Level], *, share: bool) -> Scale:
    """0 to 1 for shares; what there is, with room at both ends, for other quantities."""
    if share:
        return Scale(0, 1)
    low, high = min(level.low for level in levels), max(level.high for level in levels)
    room = 0.08 * (high - low) or 0.1
    return Scale(low - room, high + room)


def difference(value: float, low: float, high: float) -> str:
    """`+0.12 [+0.03, +0.21]`."""
    return f"{words.signed_number(value)} {words.signed_numbers(low, high)}"


def curve_charts(report: CurveReport) -> list[Chart]:
    """Held-out loss and metric against examples, the intervals as bands; sizes on a log axis."""
    return [
        _curve([(point.rows, point.loss) for point in report.points], "held-out loss, nats a token", share=False),
        _curve([(point.rows, point.score) for point in report.points], report.metric.replace("_", " "), share=True),
    ]


def _curve(points: Sequence[tuple[int, Level]], name: str, *, share: bool) -> Chart:
    x = Scale(points[0][0], points[-1][0], log=True)
    y = level_scale([level for _, level in points], share=share)
    drawn = [(float(rows), level.low, level.value, level.high) for rows, level in points]
    plot = band_chart(drawn, x, y, {}, f"{name} by examples")
    x_ticks = tuple((x(rows), f"{rows:g}") for rows, _ in points)
    return Chart(plot, "training examples", x_ticks, name, tuple((y(t), f"{t:.3g}") for t in ticks(y.low, y.high, 5)))


def rebased_tracks(task: Rebased) -> tuple[Markup, Markup]:
    """Old and new on one scale."""
    scale = Scale(0, 1)
    old, new = (
        interval_track(Mark(level.value, level.low, level.high, style, title(level)), scale, None)
        for level, style in ((task.old, "prompt"), (task.new, "finetune"))
    )
    return old, new
