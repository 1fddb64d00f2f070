"""Everything that one report shows."""

from typing import Any

from graftwork.report.online_records import ExperimentReport
from graftwork.report.outcome_records import CurveReport, OutcomesReport, RebaseReport
from graftwork.report.quantize_records import QuantizeReport
from graftwork.report.record import Record
from graftwork.report.records import CompareReport, PlanRow, ServingRecord, StageTime, TrainRun
from graftwork.report.sweep_records import SweepRecord


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
