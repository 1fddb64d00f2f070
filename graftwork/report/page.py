"""The page: templates filled with figures, everything inline. A policy in the page forbids fetching anything."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from graftwork import __version__
from graftwork.metrics import QUANTILE_RULE
from graftwork.report import figures, online, outcomes, regret, study, sweep, words
from graftwork.report.whole import ReportInput
from graftwork.storage import Store

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class BuiltReport:
    """Where the two files are."""

    json_uri: str
    html_uri: str


def build(report: ReportInput, store: Store, *parts: str) -> BuiltReport:
    """Write `report.json` and `report.html` under a key. Runs in the driver. Raises StorageError."""
    store.write_bytes(render_json(report).encode(), *parts, "report.json")
    store.write_bytes(render_html(report).encode(), *parts, "report.html")
    return BuiltReport(store.path(*parts, "report.json"), store.path(*parts, "report.html"))


def render_json(report: ReportInput) -> str:
    """The records as indented JSON: what the page was made of."""
    return report.model_dump_json(indent=1) + "\n"


def render_html(report: ReportInput) -> str:
    """The whole page. Text from records is escaped; sections without a record are left out."""
    found = next((one.sentence for one in (report.quantize, report.study, report.experiment) if one), report.title)
    verdict = report.verdict or (report.compare.advice.sentence if report.compare else found)
    return _environment().get_template("report.html.j2").render(report=report, verdict=verdict, version=__version__)


@cache
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["tojson_plain"] = lambda tree: json.dumps(tree, ensure_ascii=False)
    env.globals.update(
        fig=figures,
        study=study,
        regret=regret,
        sweep=sweep,
        online=online,
        outcomes=outcomes,
        words=words,
        quantile_rule=QUANTILE_RULE,
    )
    env.globals["style"] = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return env
