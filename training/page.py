"""The page of a run: its curves, what it gained and lost, what was predicted of it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from graftwork import base_model
from graftwork.base_model import compute_dtype
from graftwork.errors import ConfigError
from graftwork.memory import RowSizes
from graftwork.memory.measured import Correction
from graftwork.model_shape import ModelShape
from graftwork.plan import Machine, plan_training
from graftwork.report import BuiltReport, build
from graftwork.report.outcome_records import Change, OutcomesReport
from graftwork.report.outcomes import PARTS
from graftwork.report.records import PlanRow, Series, TrainRun
from graftwork.report.whole import ReportInput
from graftwork.storage import RunPaths
from graftwork.training.data import PreparedData
from graftwork.training.records import TrainReport
from graftwork.training.rows.token_rows import Rows
from graftwork.training.spec import TrainSpec
from graftwork.training.steplog import StepReport, read_steps

COMMON = frozenset({"mean_token_accuracy", "entropy"})
"""Figures of every trainer of TRL that say the same as the loss."""


def write_page(
    run: RunPaths, spec: TrainSpec, report: TrainReport, data: PreparedData, outcomes: OutcomesReport | None
) -> BuiltReport:
    """report.json and report.html in the run's folder. In the driver, once a run is finished. Raises StorageError."""
    planned, notes = _planned(spec, report, data)
    shown = train_run(report, spec, read_steps(run), notes)
    page = ReportInput(
        title=spec.name, subtitle=report.run_id, created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=sentence(spec, report, outcomes), train=(shown,), outcomes=outcomes, plan=planned,
        provenance={**run.store.read_json(*run.provenance()), "spec": spec.model_dump(mode="json")},
    )  # fmt: skip
    return build(page, run.store, *run.file())


def train_run(
    found: TrainReport, spec: TrainSpec, steps: Sequence[StepReport] = (), notes: Sequence[str] = ()
) -> TrainRun:
    """One training run, with its method in a few words."""
    context = f", {spec.data.context.k} passages a row" if spec.data.context else ""
    kind = "" if spec.objective.kind == "sft" else f"{spec.objective.kind}, "
    return TrainRun(
        name=spec.name, adapter=found.published, loss=found.train_loss, eval_loss=found.eval_loss, rows=found.rows,
        dropped_rows=found.dropped_rows, tokens=found.tokens, tokens_per_s=found.tokens_per_s, wall_s=found.wall_s,
        peak_memory_bytes=tuple(found.peak_rss_bytes_per_worker), workers=spec.num_workers, reused=found.reused,
        method=f"{kind}{spec.adapter.said()} on {spec.quant.kind}, lr {spec.optim.lr:g}{context}",
        series=_series(steps), notes=(*found.notes, *notes),
    )  # fmt: skip


def sentence(spec: TrainSpec, report: TrainReport, outcomes: OutcomesReport | None) -> str:
    """What the run came to, in one sentence."""
    if outcomes is None:
        last = f"; held-out loss {report.eval_loss[-1][1]:.3f}" if report.eval_loss else ""
        return (f"{report.steps} steps on {report.rows} rows, loss {report.train_loss[-1][1]:.3f}{last}. What the base "
                "forgot was not measured: --set outcomes.retention={}")  # fmt: skip
    named = {verdict: [_named(change) for change in outcomes.changes if change.verdict == verdict]
             for verdict in ("better", "worse", "undecided")}  # fmt: skip
    parts = [f"{word}: {', '.join(named[verdict])}" for verdict, word in (("better", "gained"), ("worse", "lost"))
             if named[verdict]]  # fmt: skip
    if named["undecided"]:
        rest = f"in {len(named['undecided'])} of {outcomes.family}" if parts else f"in {', '.join(named['undecided'])}"
        parts.append(f"no change shown {rest}")
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "."


def _named(change: Change) -> str:
    """`General text (nats)`, as in the page's headings."""
    group = f", {change.group}" if change.group else ""
    return f"{PARTS[change.part].lower()}{group} ({change.metric.replace('_', ' ')})"


def _series(steps: Sequence[StepReport]) -> tuple[Series, ...]:
    """The kind's own figures, those that changed over the run."""
    names = sorted({name for step in steps for name in step.metrics} - COMMON)
    found = [(name, tuple((step.step, step.metrics[name]) for step in steps if name in step.metrics)) for name in names]
    return tuple(Series(name=name, points=points) for name, points in found if len({y for _, y in points}) > 1)


def _planned(spec: TrainSpec, report: TrainReport, data: PreparedData) -> tuple[tuple[PlanRow, ...], tuple[str, ...]]:
    """Predicted and actual of the run. Time is left out: the plan's holds the start, the run's does not."""
    actual = max(report.peak_cuda_bytes_per_worker) if spec.gpus else max(report.peak_rss_bytes_per_worker)
    dtype, _ = compute_dtype(spec.quant, "cuda" if spec.gpus else "cpu")
    shape = ModelShape.from_config(base_model.resolve(spec.base).config)
    try:
        held_out = _sizes(data.eval) if data.eval is not None else None
        plan = plan_training(spec, shape, _sizes(data.train), held_out, _unlearned(dtype.itemsize))
    except ConfigError as error:
        return (), (f"nothing was predicted: {error.asked}, {error.found}",)
    row = PlanRow(stage=f"{spec.num_workers} workers, each", predicted_bytes=plan.peak_bytes_per_process,
                  actual_bytes=actual)  # fmt: skip
    return (row,), ()


def _unlearned(value_bytes: int) -> Machine:
    """This machine, without what this very run has taught the plan."""
    return replace(Machine.here(value_bytes), peaks=Correction())


def _sizes(rows: Rows) -> RowSizes:
    return RowSizes.of(rows.lengths_N.tolist(), rows.scored_N.tolist())
