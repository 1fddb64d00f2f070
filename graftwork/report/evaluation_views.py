"""Views of the records in `evaluation_schema`: live experiments, evaluations before and after training, rebases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graftwork.metrics import FAIR_AT_ZERO
from graftwork.report import format as words
from graftwork.report.charts import Mark, Scale, band_chart, interval_track, ticks
from graftwork.report.evaluation_schema import (
    Change,
    CurveReport,
    ExperimentReport,
    Level,
    OnlineContrast,
    OnlineGuardrail,
    OutcomesReport,
    PairedTest,
    Rebased,
)
from graftwork.report.schema import MetricInfo
from graftwork.report.views import Chart, Tick

# Live experiments: the effect and its confidence sequence as the log grew.


def path_chart(report: ExperimentReport, contrast: OnlineContrast) -> Chart | None:
    """Estimate and confidence sequence by n (log axis), with 0 and the margin; None before there is an interval."""
    points = [p for p in contrast.path if math.isfinite(p.low) and math.isfinite(p.high)]
    if len(points) < 2:
        return None
    shown = _axis_reach(report, contrast, [abs(p.estimate) for p in points])
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
    reach = _axis_reach(report, contrast, [])
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


def _axis_reach(report: ExperimentReport, contrast: OnlineContrast, seen: Sequence[float]) -> float:
    """Far enough for the last interval, the margin and the later estimates; wide early intervals are cut."""
    late = seen[len(seen) // 3 :]
    known = [abs(v) for v in (contrast.low, contrast.high, contrast.estimate or 0.0) if math.isfinite(v)]
    return 1.6 * max([report.margin, *known, *late])


def _powers(scale: Scale) -> list[int]:
    found = [step * 10**power for power in range(9) for step in (1, 3)]
    return [n for n in found if scale.low <= n <= scale.high]


# Before and after training: one row for each metric, both values on one scale.


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
    """Return the better direction of a metric."""
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
