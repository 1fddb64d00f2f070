"""Report of a run: progress while it runs, the measured result, and the page with curves and predicted memory."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from graftwork import stats
from graftwork.base.load import ResolvedBase
from graftwork.base.model_shape import ModelShape
from graftwork.errors import BaseModelError, ConfigError, StoreUnreachable
from graftwork.planning.hardware import GIB
from graftwork.report import BuiltReport, build
from graftwork.report.evaluation_schema import Change, OutcomesReport
from graftwork.report.evaluation_views import PARTS
from graftwork.report.format import interval, number, score
from graftwork.report.render import ReportInput
from graftwork.report.schema import PlanRow, StepSeries, TrainRun
from graftwork.storage.store import RunPaths
from graftwork.training.autotune import machine_of, sizes_of
from graftwork.training.evaluation.questions import Probe
from graftwork.training.evaluation.spec import work_of
from graftwork.training.local_worker import needs_ray_train
from graftwork.training.objectives.rows import PreparedData
from graftwork.training.planning.plan import plan_training
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport, read_steps

_HEADLINES = ("accuracy", "label_accuracy", "reward", "exact_match")
"""Headline figures of held-out rows: of pairs, of sampled answers, of generated ones; else their loss."""


@dataclass(frozen=True)
class Progress:
    """Position of a run. Passed to a callback in the driver, at most a few times a second."""

    step: int
    total_steps: int
    loss: float
    tokens_per_s: float
    """Over the last steps, all workers together, padding left out."""
    eta_s: float
    """Seconds to the last step at that pace."""
    eval_loss: float | None = None
    """The last one measured."""


@dataclass(frozen=True)
class TrainReport:
    """A finished run, measured."""

    run_id: str
    adapter: str | None
    """`task@version`, as published; None where all weights were trained."""
    version: str
    """Of the adapter, or of the base."""
    reused: bool
    """The run had finished before; nothing was trained now."""
    steps: int
    rows: int
    """Training rows, after dropping."""
    dropped_rows: int
    """Training rows longer than `max_length`."""
    tokens: int
    """Tokens processed, padding left out."""
    wall_s: float
    """Seconds since the first step, evaluations and checkpoints and resumed parts included, loading left out."""
    tokens_per_s: float
    """Tokens over the seconds in training steps alone, all workers together."""
    train_loss: tuple[tuple[int, float], ...]
    """(step, mean loss in nats over the step's trained tokens)."""
    eval_loss: tuple[tuple[int, float], ...]
    peak_rss_bytes_per_worker: tuple[int, ...]
    peak_cuda_bytes_per_worker: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """Values that were resolved, rows that were left out, with the reason."""
    base: str | None = None
    """Place of the new base, as `base:` takes it, where all weights were trained."""
    eval_rows: int = 0
    """Held-out rows, after dropping."""
    dropped_eval_rows: int = 0
    """Held-out rows longer than `max_length`."""
    eval_metrics: Mapping[str, float] = field(default_factory=dict)
    """The kind's own figures of the held-out rows, when they were last evaluated (accuracy, reward, ...)."""
    outcomes: Mapping[str, Any] | None = None
    """The OutcomesReport, JSON-ready, where the spec asks for one."""
    page: str = ""
    """Where report.html is."""

    @property
    def published_name(self) -> str:
        """Name and version of the published adapter or base, as text."""
        return self.adapter or f"base {self.base}"

    @property
    def rows_text(self) -> str:
        """`48 rows (0 dropped), 18 held-out rows (6 dropped)`."""
        held_out = f", {self.eval_rows} held-out rows ({self.dropped_eval_rows} dropped)" if self.eval_rows else ""
        return f"{self.rows} rows ({self.dropped_rows} dropped){held_out}"

    @property
    def held_out(self) -> str:
        """The figure of the held-out rows that says most of this kind of run, and their loss; empty without such rows.

        `held-out accuracy 0.44 [0.25, 0.66] of 18 pairs, where chance is 0.50; held-out loss 0.690 (0.693 at step 4)`
        """
        parts = [
            _headline(name, self.eval_metrics[name], self.eval_rows) for name in _HEADLINES if name in self.eval_metrics
        ][:1]
        if self.eval_loss and "reward" not in self.eval_metrics:  # of sampled answers the loss is minus the reward
            (step, first), (_, last) = self.eval_loss[0], self.eval_loss[-1]
            parts.append(f"held-out loss {last:.3f}" + (f" ({first:.3f} at step {step})" if self.eval_loss[1:] else ""))
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready. A figure that is NaN or infinite becomes null."""
        eval_loss = tuple((step, _finite(loss)) for step, loss in self.eval_loss)
        eval_metrics = {name: _finite(value) for name, value in self.eval_metrics.items()}
        return {**asdict(self), "eval_loss": eval_loss, "eval_metrics": eval_metrics}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, reused: bool) -> "TrainReport":
        """From what `as_dict` gave, through JSON."""
        pairs = {key: tuple((int(s), _number(v)) for s, v in record[key]) for key in ("train_loss", "eval_loss")}
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        metrics = {name: _number(value) for name, value in record.get("eval_metrics", {}).items()}
        return cls(**{**record, **lists, **pairs, "eval_metrics": metrics, "reused": reused})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _headline(name: str, value: float, rows: int) -> str:
    if name != "accuracy" or not rows:
        return f"held-out {name.replace('_', ' ')} {number(value)}"
    found = stats.wilson(round(value * rows), rows)
    return f"held-out accuracy {score(value)} {interval(found.low, found.high)} of {rows} pairs, where chance is 0.50"


COMMON = frozenset({"mean_token_accuracy", "entropy"})
"""Figures of every trainer of TRL that say the same as the loss."""


def write_page(
    run: RunPaths, spec: TrainSpec, report: TrainReport, outcomes: OutcomesReport | None, steps: Sequence[StepReport]
) -> tuple[BuiltReport, tuple[str, ...]]:
    """Write report.json and report.html into the run's folder; return them, and notes on what the page lacks.

    In the driver, once a run is finished. Raises StorageError.
    """
    known, planned, notes = _recorded_plan(run), tuple[PlanRow, ...](), tuple[str, ...]()
    if "plan" in known:  # time is left out: the plan's holds the start, the run's does not
        plan, workers = known["plan"], known["plan"]["processes"]
        actual = max(report.peak_cuda_bytes_per_worker) or max(report.peak_rss_bytes_per_worker)
        stage = "1 worker" if workers == 1 else f"{workers} workers, each"
        planned = (PlanRow(stage=stage, predicted_bytes=plan["peak_bytes_per_process"], actual_bytes=actual),)
    else:
        notes = (f"no prediction of memory to compare with: {known['reason']}",)
    page = ReportInput(
        title=spec.name,
        subtitle=report.run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=sentence(report, outcomes),
        train=(train_run(report, spec, steps, notes),),
        outcomes=outcomes,
        plan=planned,
        provenance={**run.store.read_json(*run.provenance()), "spec": spec.model_dump(mode="json")},
    )
    return build(page, run.store, *run.file()), notes


def train_run(
    found: TrainReport, spec: TrainSpec, steps: Sequence[StepReport] = (), notes: Sequence[str] = ()
) -> TrainRun:
    """One training run, with its method in a few words."""
    context = f", {spec.data.context.k} passages a row" if spec.data.context else ""
    kind = "" if spec.objective.kind == "sft" else f"{spec.objective.kind}, "
    series = []
    for name in sorted({name for step in steps for name in step.metrics} - COMMON):
        points = tuple((step.step, step.metrics[name]) for step in steps if name in step.metrics)
        if len({y for _, y in points}) > 1:  # those that changed over the run
            series.append(StepSeries(name=name, points=points))
    base = spec.quant.kind if spec.quant.is_packed else "an unquantised base"
    return TrainRun(
        name=spec.name,
        adapter=found.published_name,
        loss=found.train_loss,
        eval_loss=found.eval_loss,
        rows=found.rows,
        dropped_rows=found.dropped_rows,
        eval_rows=found.eval_rows,
        dropped_eval_rows=found.dropped_eval_rows,
        tokens=found.tokens,
        tokens_per_s=found.tokens_per_s,
        wall_s=found.wall_s,
        peak_memory_bytes=tuple(found.peak_rss_bytes_per_worker),
        workers=spec.num_workers,
        reused=found.reused,
        method=f"{kind}{spec.adapter.describe()} on {base}, lr {spec.optim.lr:g}{context}",
        series=tuple(series),
        notes=(*found.notes, *notes),
    )


def sentence(report: TrainReport, outcomes: OutcomesReport | None) -> str:
    """The run's result in one or two sentences: what the held-out rows say, and what changed in the outcomes.

    Training loss is said only where there is nothing else: it falls whatever was learned.
    """
    held_out = f"{report.held_out[:1].upper()}{report.held_out[1:]}." if report.held_out else ""
    if outcomes is None:
        size = f"{report.steps} steps on {report.rows} rows"
        done = f"{held_out} {size}." if held_out else f"{size}, training loss {report.train_loss[-1][1]:.3f}."
        return f"{done} What the base forgot was not measured: --set outcomes.retention={{}}"
    named = {
        verdict: [_change_name(change) for change in outcomes.changes if change.verdict == verdict]
        for verdict in ("better", "worse", "undecided")
    }
    parts = [
        f"{word}: {', '.join(named[verdict])}"
        for verdict, word in (("better", "gained"), ("worse", "lost"))
        if named[verdict]
    ]
    if named["undecided"]:
        rest = f"in {len(named['undecided'])} of {outcomes.family}" if parts else f"in {', '.join(named['undecided'])}"
        parts.append(f"no change shown {rest}")
    moved = [
        f"{_change_name(change)} {number(change.before.value)} -> {number(change.after.value)}"
        for change in outcomes.changes
        if change.verdict is None and (change.test.low > 0 or change.test.high < 0)  # the interval excludes 0
    ]
    parts += [f"changed, not tested: {', '.join(moved)}"] if moved else []
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}. {held_out}".strip()


def _change_name(change: Change) -> str:
    """`General text (nats)`, as in the page's headings."""
    group = f", {change.group}" if change.group else ""
    return f"{PARTS[change.part].lower()}{group} ({change.metric.replace('_', ' ')})"


def plan_of_run(spec: TrainSpec, base: ResolvedBase, data: PreparedData, probes: Sequence[Probe]) -> dict[str, Any]:
    """Prediction of a run before it starts, as `plan` shows it: {"plan": ...}, or {"reason": why there is none}."""
    held_out = sizes_of(data.eval) if data.eval is not None else None
    try:
        shape, machine = ModelShape.from_config(base.config), machine_of(spec)
        work = work_of([probe.part for probe in probes]) if probes else None
        on_cluster, rows = needs_ray_train(spec), sizes_of(data.train)
        return {"plan": plan_training(spec, shape, rows, held_out, machine, work, on_cluster=on_cluster).as_dict()}
    except (BaseModelError, ConfigError) as error:
        return {"reason": f"{error.subject}, {error.problem}"}


def memory_notes(run: RunPaths, peaks: Sequence[int]) -> tuple[str, ...]:
    """Predicted and largest measured bytes of a worker, in words; nothing where nothing was predicted."""
    known = _recorded_plan(run)
    if "plan" not in known or not any(peaks):
        return ()
    predicted, most = known["plan"]["peak_bytes_per_process"] / GIB, max(peaks) / GIB
    return (f"memory of a worker: {predicted:.2f} GiB predicted, {most:.2f} GiB at the peak",)


def _recorded_plan(run: RunPaths) -> dict[str, Any]:
    """Return the prediction that `plan_of_run` made when the run first started."""
    if not run.store.exists(*run.plan()):
        return {"reason": "the run was started by a version that recorded no plan"}
    found: dict[str, Any] = run.store.read_json(*run.plan())
    return found


PROGRESS_S = 0.3
PACE_STEPS = 20
"""Steps that the shown pace is measured over."""
LEAVE_S = 1.0
"""Seconds that a failed block waits for the thread, which may hang in an outage of the store."""
OnProgress = Callable[[Progress], None]


@contextlib.contextmanager
def follow_progress(run: RunPaths, on_progress: OnProgress) -> Iterator[None]:
    """Report a run's progress for the time of the block, its last steps included where the block ends well.

    `on_progress` is called in a thread and the block, which waits for Ray, is the caller's, so that Ctrl-C takes it out
    of its wait. A thread left in a call of Ray's while Ray is shut down either waits permanently, and the process at
    its exit for the thread, or has Ray end the process on the spot (ray issue 48018, ray pull request 19115; Ray 2.60).
    The thread is a daemon, which no exit waits for. Raises what it raised, once the block has ended well.
    """
    ended, reporting, patient, shown = threading.Event(), futures.Future[None](), run.patiently(0), 0

    def look() -> None:
        nonlocal shown
        try:
            steps = read_steps(patient)
        except StoreUnreachable:
            return  # an outage: the workers wait it out
        if steps and steps[-1].step != shown:
            on_progress(progress_of(steps))
            shown = steps[-1].step

    def report() -> None:
        try:
            while not ended.wait(PROGRESS_S):
                look()
        except Exception as error:  # whatever the callback raises is raised again at the block's end
            reporting.set_exception(error)
        else:
            reporting.set_result(None)

    threading.Thread(target=report, name="progress", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        futures.wait([reporting], timeout=LEAVE_S)
    reporting.result()
    look()


def progress_of(steps: list[StepReport]) -> Progress:
    """Progress from the steps noted so far, at least one."""
    last, recent = steps[-1], steps[-PACE_STEPS:]
    before = steps[-len(recent) - 1] if len(steps) > len(recent) else None
    tokens = last.tokens - (before.tokens if before else 0)
    seconds = last.elapsed_s - (before.elapsed_s if before else 0.0)
    return Progress(
        step=last.step,
        total_steps=last.total_steps,
        loss=last.loss,
        tokens_per_s=tokens / max(sum(step.step_s for step in recent), 1e-9),
        eta_s=(last.total_steps - last.step) * seconds / len(recent),
        eval_loss=next((step.eval_loss for step in reversed(steps) if step.eval_loss is not None), None),
    )
