"""Records of a job -> `report.json` and one self-contained `report.html` that opens with no network."""

from graftwork.report.records import CompareReport, ReportInput

__all__ = ["CompareReport", "ReportInput"]
