"""The page of a run: its curves, what it gained and lost, what was predicted of it."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from graftwork.base_model import ResolvedBase
from graftwork.errors import BaseModelError, ConfigError
from graftwork.memory import GIB
from graftwork.model_shape import ModelShape
from graftwork.plan import plan_training
from graftwork.report import BuiltReport, build, words
from graftwork.report.outcome_records import Change, OutcomesReport
from graftwork.report.outcomes import PARTS
from graftwork.report.records import PlanRow, StepSeries, TrainRun
from graftwork.report.whole import ReportInput
from graftwork.storage import RunPaths
from graftwork.training.data import PreparedData
from graftwork.training.outcomes.parts import work_of
from graftwork.training.outcomes.probes import Probe
from graftwork.training.records import TrainReport
from graftwork.training.settled import machine_of, sizes_of
from graftwork.training.spec import TrainSpec
from graftwork.training.steplog import StepReport, read_steps

COMMON = frozenset({"mean_token_accuracy", "entropy"})
"""Figures of every trainer of TRL that say the same as the loss."""


def write_page(
    run: RunPaths, spec: TrainSpec, report: TrainReport, outcomes: OutcomesReport | None
) -> tuple[BuiltReport, tuple[str, ...]]:
    """Write report.json and report.html into the run's folder; return them, and notes on what the page lacks.

    In the driver, once a run is finished. Raises StorageError.
    """
    planned, notes = _planned(run, report)
    shown = train_run(report, spec, read_steps(run), notes)
    page = ReportInput(
        title=spec.name, subtitle=report.run_id, created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=sentence(spec, report, outcomes), train=(shown,), outcomes=outcomes, plan=planned,
        provenance={**run.store.read_json(*run.provenance()), "spec": spec.model_dump(mode="json")},
    )  # fmt: skip
    return build(page, run.store, *run.file()), notes


def train_run(
    found: TrainReport, spec: TrainSpec, steps: Sequence[StepReport] = (), notes: Sequence[str] = ()
) -> TrainRun:
    """One training run, with its method in a few words."""
    context = f", {spec.data.context.k} passages a row" if spec.data.context else ""
    kind = "" if spec.objective.kind == "sft" else f"{spec.objective.kind}, "
    base = "an unquantised base" if spec.quant.kind == "none" else spec.quant.kind
    return TrainRun(
        name=spec.name, adapter=found.published_name, loss=found.train_loss, eval_loss=found.eval_loss, rows=found.rows,
        dropped_rows=found.dropped_rows, eval_rows=found.eval_rows, dropped_eval_rows=found.dropped_eval_rows,
        tokens=found.tokens, tokens_per_s=found.tokens_per_s, wall_s=found.wall_s,
        peak_memory_bytes=tuple(found.peak_rss_bytes_per_worker), workers=spec.num_workers, reused=found.reused,
        method=f"{kind}{spec.adapter.describe()} on {base}, lr {spec.optim.lr:g}{context}",
        series=_series(steps), notes=(*found.notes, *notes),
    )  # fmt: skip


def sentence(spec: TrainSpec, report: TrainReport, outcomes: OutcomesReport | None) -> str:
    """The run's result in one or two sentences: what the held-out rows say, and what changed in the outcomes.

    Training loss is said only where there is nothing else: it falls whatever was learned.
    """
    held_out = f"{report.held_out[:1].upper()}{report.held_out[1:]}." if report.held_out else ""
    if outcomes is None:
        size = f"{report.steps} steps on {report.rows} rows"
        done = f"{held_out} {size}." if held_out else f"{size}, training loss {report.train_loss[-1][1]:.3f}."
        return f"{done} What the base forgot was not measured: --set outcomes.retention={{}}"
    named = {verdict: [_named(change) for change in outcomes.changes if change.verdict == verdict]
             for verdict in ("better", "worse", "undecided")}  # fmt: skip
    parts = [f"{word}: {', '.join(named[verdict])}" for verdict, word in (("better", "gained"), ("worse", "lost"))
             if named[verdict]]  # fmt: skip
    if named["undecided"]:
        rest = f"in {len(named['undecided'])} of {outcomes.family}" if parts else f"in {', '.join(named['undecided'])}"
        parts.append(f"no change shown {rest}")
    moved = [f"{_named(change)} {words.number(change.before.value)} -> {words.number(change.after.value)}"
             for change in outcomes.changes if change.verdict is None and _moved(change)]  # fmt: skip
    parts += [f"changed, not tested: {', '.join(moved)}"] if moved else []
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}. {held_out}".strip()


def _moved(change: Change) -> bool:
    """The interval of the difference excludes 0."""
    return change.test.low > 0 or change.test.high < 0


def _named(change: Change) -> str:
    """`General text (nats)`, as in the page's headings."""
    group = f", {change.group}" if change.group else ""
    return f"{PARTS[change.part].lower()}{group} ({change.metric.replace('_', ' ')})"


def _series(steps: Sequence[StepReport]) -> tuple[StepSeries, ...]:
    """The kind's own figures, those that changed over the run."""
    names = sorted({name for step in steps for name in step.metrics} - COMMON)
    found = [(name, tuple((step.step, step.metrics[name]) for step in steps if name in step.metrics)) for name in names]
    return tuple(StepSeries(name=name, points=points) for name, points in found if len({y for _, y in points}) > 1)


def plan_of_run(spec: TrainSpec, base: ResolvedBase, data: PreparedData, probes: Sequence[Probe]) -> dict[str, Any]:
    """What is predicted of a run before it starts, as `plan` shows it: {"plan": ...}, or {"reason": why not}."""
    held_out = sizes_of(data.eval) if data.eval is not None else None
    try:
        shape, machine = ModelShape.from_config(base.config), machine_of(spec)
        work = work_of([probe.part for probe in probes])
        return {"plan": plan_training(spec, shape, sizes_of(data.train), held_out, machine, work).as_dict()}
    except (BaseModelError, ConfigError) as error:
        return {"reason": f"{error.subject}, {error.problem}"}


def memory_notes(run: RunPaths, peaks: Sequence[int]) -> tuple[str, ...]:
    """Predicted and largest measured bytes of a worker, in words; nothing where nothing was predicted."""
    known = _recorded(run)
    if "plan" not in known or not any(peaks):
        return ()
    predicted, most = known["plan"]["peak_bytes_per_process"] / GIB, max(peaks) / GIB
    return (f"memory of a worker: {predicted:.2f} GiB predicted, {most:.2f} GiB at the peak",)


def _planned(run: RunPaths, report: TrainReport) -> tuple[tuple[PlanRow, ...], tuple[str, ...]]:
    """Predicted and actual of the run. Time is left out: the plan's holds the start, the run's does not."""
    known = _recorded(run)
    if "plan" not in known:
        return (), (f"no prediction of memory to compare with: {known['reason']}",)
    plan = known["plan"]
    actual = max(report.peak_cuda_bytes_per_worker) or max(report.peak_rss_bytes_per_worker)
    workers = plan["processes"]
    stage = "1 worker" if workers == 1 else f"{workers} workers, each"
    row = PlanRow(stage=stage, predicted_bytes=plan["peak_bytes_per_process"], actual_bytes=actual)
    return (row,), ()


def _recorded(run: RunPaths) -> dict[str, Any]:
    """Return the prediction that `plan_of_run` made when the run first started."""
    if not run.store.exists(*run.plan()):
        return {"reason": "the run was started by a version that recorded no plan"}
    found: dict[str, Any] = run.store.read_json(*run.plan())
    return found
