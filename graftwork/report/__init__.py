"""Records of a job -> `report.json` and one self-contained `report.html` that opens with no network."""

from graftwork.report.page import BuiltReport, Section, build, environment, render_html, render_json
from graftwork.report.records import CompareReport
from graftwork.report.whole import ReportInput

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
