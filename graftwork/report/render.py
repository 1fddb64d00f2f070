"""Renderer of the report page: templates with inline SVG and CSS. A content policy forbids loading anything."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from graftwork import __version__
from graftwork.metrics import QUANTILE_RULE
from graftwork.report import evaluation_views, sweep_charts, sweep_views, views
from graftwork.report import format as words
from graftwork.report.evaluation_schema import (
    CurveReport,
    ExperimentReport,
    OutcomesReport,
    QuantizeReport,
    RebaseReport,
)
from graftwork.report.schema import CompareReport, PlanRow, Record, ServingRecord, StageTime, TrainRun
from graftwork.report.sweep_schema import SweepRecord
from graftwork.storage.store import Store


class ReportInput(Record):
    """Everything a report shows. Sections without a record are left out."""

    title: str
    subtitle: str = ""
    created_at: str
    """ISO 8601."""
    verdict: str | None = None
    """One sentence; None takes the comparison's advice."""
    compare: CompareReport | None = None
    tune: SweepRecord | None = None
    train: tuple[TrainRun, ...] = ()
    plan: tuple[PlanRow, ...] = ()
    serving: ServingRecord | None = None
    quantize: QuantizeReport | None = None
    experiment: ExperimentReport | None = None
    outcomes: OutcomesReport | None = None
    curve: CurveReport | None = None
    rebase: RebaseReport | None = None
    stages: tuple[StageTime, ...] = ()
    provenance: dict[str, Any] = {}


_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class BuiltReport:
    """Locations of the two files."""

    json_uri: str
    html_uri: str


@dataclass(frozen=True)
class Section:
    """Part of a page that is rendered outside this package, from templates of `environment(folder)`."""

    html: Markup
    links: tuple[tuple[str, str], ...]
    """(anchor, text) of its entries in the contents."""
    glossary: Markup = Markup("")
    """`dt` and `dd` elements; a page with them leaves out the terms of serving."""
    style: Markup = Markup("")
    """CSS after the page's own."""


def build(report: ReportInput, store: Store, *parts: str, section: Section | None = None) -> BuiltReport:
    """Write `report.json` and `report.html` under a key. Runs in the driver. Raises StorageError."""
    store.write_bytes(render_json(report).encode(), *parts, "report.json")
    store.write_bytes(render_html(report, section).encode(), *parts, "report.html")
    return BuiltReport(store.path(*parts, "report.json"), store.path(*parts, "report.html"))


def render_json(report: ReportInput) -> str:
    """The records as indented JSON: what the page was made of."""
    return report.model_dump_json(indent=1) + "\n"


def render_html(report: ReportInput, section: Section | None = None) -> str:
    """Return the whole page. Text from records is escaped; sections without a record are left out."""
    found = next((one.sentence for one in (report.quantize, report.experiment) if one), report.title)
    verdict = report.verdict or (report.compare.advice.sentence if report.compare else found)
    page = environment().get_template("report.html.j2")
    return page.render(report=report, verdict=verdict, version=__version__, section=section)


@cache
def environment(*folders: Path) -> Environment:
    """Return the page's templates, filters and globals, with the templates of further folders."""
    env = Environment(
        loader=FileSystemLoader([_TEMPLATES, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["tojson_plain"] = lambda tree: json.dumps(tree, ensure_ascii=False)
    env.globals.update(
        fig=views,
        sweep=sweep_views,
        charts=sweep_charts,
        online=evaluation_views,
        outcomes=evaluation_views,
        words=words,
        quantile_rule=QUANTILE_RULE,
    )
    env.globals["style"] = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return env
