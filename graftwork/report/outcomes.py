"""Outcomes -> what the page shows: a line for each metric, before and after on one scale."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graftwork.metrics import FAIR_AT_ZERO
from graftwork.report import words
from graftwork.report.figures import Chart, Tick
from graftwork.report.outcome_records import Change, CurveReport, Level, OutcomesReport, PairedTest, Rebased
from graftwork.report.plots import Mark, Scale, band_chart, interval_track, ticks
from graftwork.report.records import MetricInfo

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
    return [(PARTS[part], [_row(change, report) for change in report.changes if change.part == part])
            for part in parts]  # fmt: skip


def _row(change: Change, report: OutcomesReport) -> ChangeRow:
    same = [one for one in report.changes if one.metric == change.metric and one.part == change.part]
    info = next(info for info in report.metrics if info.name == change.metric)
    scale = level_scale(
        [level for one in same for level in (one.before, one.after)],
        share=info.kind == "binary" or (info.kind == "graded" and info.better == "higher"),
    )
    sides = [interval_track(Mark(level.value, level.low, level.high, style, title(level)), scale, None)
             for level, style in ((change.before, "prompt"), (change.after, "finetune"))]  # fmt: skip
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
    old, new = (interval_track(Mark(level.value, level.low, level.high, style, title(level)), scale, None)
                for level, style in ((task.old, "prompt"), (task.new, "finetune")))  # fmt: skip
    return old, new
