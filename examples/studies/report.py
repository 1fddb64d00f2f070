"""Page of a study: a panel for each metric and group, and a line for each claim."""

import sys
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from examples.studies.schema import StudyClaim, StudyMeasure, StudyReport, StudyScore
from graftwork.report import ReportInput, Section, environment
from graftwork.report import format as words
from graftwork.report.charts import Mark, Scale, interval_track, ticks
from graftwork.report.views import Tick

BADGES = {"reproduced": "better", "not reproduced": "worse", "undecided": "undecided"}
"""Outcome -> the page's colour for it."""


class StudyPage(ReportInput):
    """Everything that a study's page shows."""

    study: StudyReport


def section(report: StudyReport) -> Section:
    """Return the part of the page between its head and the training runs."""
    template = environment(Path(__file__).parent).get_template("study.html.j2")
    html = Markup(template.render(st=report, study=sys.modules[__name__]))
    measures = [(f"measure-{one.name}", one.name.replace("-", " ").capitalize()) for one in report.measures]
    return Section(html, (("patterns", "Published patterns"), *measures))


@dataclass(frozen=True)
class Row:
    """One arm in a panel."""

    score: StudyScore
    track: Markup
    value: str
    interval: str


@dataclass(frozen=True)
class Panel:
    """All arms on one metric, within one group of the questions or over all."""

    metric: str
    unit: str
    group: str
    n: int
    rows: tuple[Row, ...]
    axis: tuple[Tick, ...]


def panels(measure: StudyMeasure) -> list[Panel]:
    """A panel for each metric, all questions first, then group by group on the same scale."""
    return [
        _panel(measure, info.name, info.unit, group)
        for info in measure.metrics
        for group in dict.fromkeys(score.group for score in measure.scores)
    ]


def _panel(measure: StudyMeasure, metric: str, unit: str, group: str) -> Panel:
    scale = _scale([score for score in measure.scores if score.metric == metric], metric)
    shown = [score for score in measure.scores if (score.metric, score.group) == (metric, group)]
    axis = tuple((scale(at), f"{at:g}".replace("-", "−")) for at in ticks(scale.low, scale.high))
    name = f"{measure.by} {group}" if group else ""
    return Panel(metric, unit, name, shown[0].n, tuple(_row(score, scale) for score in shown), axis)


def _scale(scores: list[StudyScore], metric: str) -> Scale:
    """0 to 1 for shares; what there is, with room at both ends, for other quantities."""
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    if metric not in ("nats", "bias"):
        return Scale(0, 1)
    room = 0.08 * (high - low) or 0.1
    return Scale(low - room, high + room)


def _row(score: StudyScore, scale: Scale) -> Row:
    value, interval = words.score(score.value).replace("-", "−"), words.interval(score.low, score.high)
    title = f"{score.arm}: {value} {interval}\n{score.signature}"
    track = interval_track(Mark(score.value, score.low, score.high, score.kind, title), scale, None)
    return Row(score, track, value, interval)


def claim_track(report: StudyReport, claim: StudyClaim) -> Markup:
    """A difference and its interval around zero, on one scale for all claims on the metric."""
    same = [other for other in report.claims if other.metric == claim.metric]
    reach = 1.05 * max(abs(end) for other in same for end in (other.low, other.high, other.value)) or 1.0
    title = f"{claim.a} − {claim.b}: {words.signed(claim.value)} {words.signed_interval(claim.low, claim.high)}"
    mark = Mark(claim.value, claim.low, claim.high, "latency", title)
    return interval_track(mark, Scale(-reach, reach), reference=0.0)


def claim_where(report: StudyReport, claim: StudyClaim) -> str:
    """`facts of a − b, popularity 1 against 5 · n=80 and 80`."""
    by = next(measure.by for measure in report.measures if measure.name == claim.measure)
    part = f", {by} {claim.of}" if claim.of else ""
    part += f" against {claim.than_of}" if claim.than_of else ""
    sizes = f"n={claim.n}" if claim.n_than_of is None else f"n={claim.n} and {claim.n_than_of}"
    return f"{claim.metric} of {claim.a} − {claim.b}{part} · {sizes}"
