"""The loss at the end against the learning rate, a curve a rank: the chart and the words of its table."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from benchmarks.regret_schema import Gap, RateCurve, RatePoint, RegretReport, RegretTask
from graftwork.report import ReportInput, Section, environment
from graftwork.report.charts import Line, Scale, element, line_chart, ticks
from graftwork.report.sweep_charts import loss
from graftwork.report.sweep_views import rate_words, rates_words, signed_loss
from graftwork.report.views import Chart

__all__ = ["gap_words", "loss", "rate_chart", "rate_words", "rates_words", "section", "sentence", "style"]
BADGES = {"reproduced": "better", "not reproduced": "worse", "undecided": "undecided"}
SHADES = 5
FOLDER = Path(__file__).parent


class RegretPage(ReportInput):
    """Everything that the page of the grids shows."""

    regret: RegretReport


def section(report: RegretReport) -> Section:
    """Return the part of the page that shows the grids, with its terms and colours."""
    html = environment(FOLDER).get_template("regret.html.j2").render(r=report, regret=sys.modules[__name__])
    links = (("patterns", "Published patterns"), *((f"rates-{task.name}", task.name) for task in report.tasks))
    glossary, style = (
        Markup((FOLDER / name).read_text(encoding="utf-8")) for name in ("regret_terms.html", "regret.css")
    )
    return Section(Markup(html), links, glossary, style)


def sentence(report: RegretReport) -> str:
    """How many of the patterns show here."""
    counts = {outcome: sum(claim.outcome == outcome for claim in report.claims) for outcome in BADGES}
    parts = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return f"Of {len(report.claims)} published patterns: {parts}."


def style(curve: RateCurve, task: RegretTask) -> str:
    """CSS class: darker for higher ranks, a colour of its own for all weights."""
    ranks = sorted(one.rank for one in task.curves if one.rank is not None)
    if curve.rank is None:
        return "full"
    return f"rank{round((SHADES - 1) * ranks.index(curve.rank) / max(len(ranks) - 1, 1))}"


def rate_chart(task: RegretTask) -> Chart:
    """Mean loss by learning rate on a log axis; a stroke from the lowest to the highest seed."""
    points = [point for curve in task.curves for point in curve.points]
    x = Scale(min(point.rate for point in points) / 1.2, max(point.rate for point in points) * 1.2, log=True)
    lowest = min(point.low for point in points)
    top = _top(task.curves)
    y = Scale(lowest - 0.06 * (top - lowest), top)
    lines = [
        Line([(one.rate, min(one.mean, top)) for one in curve.points], style(curve, task), curve.name)
        for curve in task.curves
    ]
    plot = line_chart(lines, x, y, f"loss at step {task.steps} by learning rate")
    strokes = [
        _stroke(curve, one, style(curve, task), x, Scale(y.low, y.high))
        for curve in task.curves
        for one in curve.points
    ]
    whole = element("svg", plot, *strokes, width="100%", height="100%", overflow="visible", role="img")
    rates = sorted({point.rate for point in points})
    shown = [rate for index, rate in enumerate(rates) if len(rates) <= 6 or index % 2 == 0]
    return Chart(
        whole,
        "learning rate",
        tuple((x(rate), f"{rate:g}") for rate in shown),
        "held-out loss at the end",
        tuple((y(t), f"{t:.3g}") for t in ticks(y.low, y.high)),
    )


def _stroke(curve: RateCurve, one: RatePoint, kind: str, x: Scale, y: Scale) -> Markup:
    """From the lowest to the highest seed."""
    title = f"{curve.name}, {one.rate:g}: {loss(one.mean)}, seeds {loss(one.low)} to {loss(one.high)}, n={one.n}"
    at, ends = f"{x(one.rate):.2f}%", [f"{100 - y(min(value, y.high)):.2f}%" for value in (one.low, one.high)]
    return element("line", element("title", title), x1=at, x2=at, y1=ends[0], y2=ends[1], class_=f"range c-{kind}")


def _top(curves: Sequence[RateCurve]) -> float:
    """Where the axis ends: above the neighbours of every best rate. Rates that diverge are drawn at its edge."""
    shown = [max(_around(curve)) for curve in curves]
    lowest = min(curve.best.loss for curve in curves)
    highest = max((end for end in shown if math.isfinite(end)), default=2 * lowest)
    return highest + 0.1 * (highest - lowest)


def _around(curve: RateCurve) -> list[float]:
    """The best loss of a curve and those of its neighbours."""
    losses = [point.mean for point in curve.points]
    at = losses.index(min(losses))
    return losses[max(at - 1, 0) : at + 2]


def gap_words(gap: Gap) -> str:
    """`+0.012 [−0.004, +0.028]`."""
    return f"{signed_loss(gap.difference)} [{signed_loss(gap.low)}, {signed_loss(gap.high)}]"
