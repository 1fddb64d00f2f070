"""`report.json` and `report.html` in a sweep's folder, written whenever an attempt at it ends."""

from datetime import UTC, datetime

from graftwork.report import BuiltReport, build
from graftwork.report.sweep import sentence
from graftwork.report.sweep_records import SweepRecord
from graftwork.report.whole import ReportInput
from graftwork.storage import RunPaths
from graftwork.tuning.spec import TuneSpec


def write_page(run: RunPaths, spec: TuneSpec, record: SweepRecord) -> BuiltReport:
    """In the driver. Raises StorageError."""
    page = ReportInput(
        title=spec.name, subtitle=run.run_id, created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=sentence(record), tune=record,
        provenance={**run.store.read_json(*run.provenance()), "spec": spec.model_dump(mode="json")},
    )  # fmt: skip
    return build(page, run.store, *run.file())
