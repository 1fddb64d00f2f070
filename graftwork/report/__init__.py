"""Report of a job: records, `report.json` and one self-contained `report.html` that opens with no network."""

from graftwork.report.render import BuiltReport, ReportInput, Section, build, environment, render_html, render_json
from graftwork.report.schema import CompareReport

__all__ = [
    "BuiltReport",
    "CompareReport",
    "ReportInput",
    "Section",
    "build",
    "environment",
    "render_html",
    "render_json",
]
