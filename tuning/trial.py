"""The process of a trial, or of several together: the loop of `train`, which reports held-out losses to Ray Tune."""

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.util import get_current_placement_group
from ray.util.queue import Empty, Queue

from graftwork.environment import peak_rss_bytes
from graftwork.errors import RunError
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import PreparedData
from graftwork.training.ray_worker import fit_trial
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, NonFiniteLoss, StepReport, TrainJob, read_steps
from graftwork.tuning.forkserver import ReportFn, train_in_fork
from graftwork.tuning.remote_trial import Elsewhere, train_elsewhere
from graftwork.tuning.resources import is_distributed
from graftwork.tuning.retry import message_of
from graftwork.tuning.trial_store import TrialPaths
from graftwork.tuning.trials import Costs

POLL_INTERVAL_S = 0.5
"""Between two checks whether the workers of a distributed trial have ended without a report."""


@dataclass(frozen=True)
class TrialConfig:
    """Config that Tune passes to one process, made of plain values."""

    trials: dict[str, str]
    """The resolved training spec of each trial, as JSON, by trial id."""
    rows: str
    """Key of their rows."""
    bundles: list[dict[str, float]]
    """What Tune reserves: one bundle, that of this process."""
    worker: dict[str, float]
    """What Ray Train reserves for each worker of a distributed trial; of no use to another trial."""
    until: int | None = None
    """Step that a single trial ends at, before the sweep's last, with a checkpoint for others to begin from."""
    parent: str | None = None
    """The trial that it begins from."""


def run_trial(
    config: Mapping[str, Any],
    rows: Mapping[str, PreparedData],
    steps: int,
    report_every: int,
    control: Any,
    places: TrialPaths,
    elsewhere: Elsewhere | None = None,
) -> None:
    """Tune's function trainable; `config` is a `TrialConfig`. Runs in a Tune actor process.

    A trial that must stop reads that from the control actor after its report, and leaves. Raises NonFiniteLoss for one
    that is trained alone; of several the one that diverges leaves.
    """
    asked = TrialConfig(**config)
    specs = {trial_id: TrainSpec.model_validate_json(text) for trial_id, text in asked.trials.items()}
    jobs = {
        key: TrainJob(spec, rows[asked.rows], max_steps=steps, eval_every=report_every) for key, spec in specs.items()
    }
    reporter = _TuneReporter(specs, control)
    if len(jobs) > 1:
        from graftwork.tuning.multi_lora.train import run_together  # imports torch, which the driver need not have

        run_together(jobs, lambda steps, lost: reporter.report(steps, lost, peak_rss_bytes()))
        return
    ((trial_id, job),) = jobs.items()
    if elsewhere is not None:
        train_elsewhere(elsewhere, job, trial_id, places.sweep, _report_one(trial_id, reporter))
        return
    job = places.job(job, trial_id, asked.until, asked.parent)
    _run_alone(job, asked.worker, trial_id, asked.until or steps, reporter)


def _report_one(trial_id: str, reporter: "_TuneReporter") -> ReportFn:
    """Return a function that reports a trial which is trained alone to Tune, and raises NonFiniteLoss."""

    def report(step: StepReport, peak: int) -> bool:
        if not _is_finite(step):
            raise NonFiniteLoss(f"trial {trial_id}", f"the held-out loss is {step.eval_loss} at step {step.step}")
        return reporter.report({trial_id: step}, {}, peak)[trial_id]

    return report


def _run_alone(job: TrainJob, worker: Mapping[str, float], trial_id: str, end: int, reporter: "_TuneReporter") -> None:
    """Train one trial to step `end`. Where it writes checkpoints, its last loss is reported once the last checkpoint is
    complete: the driver then takes the trial for ended, and others may begin from there."""
    last: list[tuple[StepReport, int]] = []
    report_finite = _report_one(trial_id, reporter)

    def report(step: StepReport, peak: int) -> bool:
        if job.run is None or step.step < end or not _is_finite(step):
            return report_finite(step, peak)
        last.append((step, peak))
        return False

    done = Checkpoints(job.run).newest() if job.run is not None else None
    if job.run is not None and done is not None and done.step >= end:  # an earlier attempt was lost before its report
        last += [(step, peak_rss_bytes()) for step in read_steps(job.run) if step.step == done.step]
    elif is_distributed(job.spec):
        train_distributed_trial(job, worker, report, reporter.control, trial_id)
    elif job.spec.gpus:
        run_steps(job, lambda step: report(step, peak_rss_bytes()))
    else:
        train_in_fork(job, report)
    for step, peak in last:
        reporter.report({trial_id: step}, {}, peak)


def _is_finite(step: StepReport) -> bool:
    return step.eval_loss is None or math.isfinite(step.eval_loss)


class _TuneReporter:
    """Reports the trials of this process to Tune, and reads from the control actor which of them continue."""

    def __init__(self, specs: Mapping[str, TrainSpec], control: Any) -> None:
        self._costs = {trial_id: Costs(spec) for trial_id, spec in specs.items()}
        self.control = control

    def report(self, steps: Mapping[str, StepReport], lost: Mapping[str, RunError], peak: int) -> dict[str, bool]:
        """Of one step of each trial; `lost`: what ended others. Seconds are counted in equal shares."""
        for trial_id, step in steps.items():
            self._costs[trial_id].add(replace(step, step_s=step.step_s / len(steps)))
        in_order = [(trial_id, steps[trial_id]) for trial_id in self._costs if trial_id in steps]  # as they are judged
        losses = {key: [step.step, step.eval_loss] for key, step in in_order if step.eval_loss is not None}
        goes_on = dict.fromkeys(steps, True)
        if not losses and not lost:
            return goes_on
        metrics = {trial_id: self._costs[trial_id].metrics() for trial_id in losses}
        why = {trial_id: message_of(error) for trial_id, error in lost.items()}
        tune.report({"peak_rss_bytes": peak, "trials": losses, "metrics": metrics, "lost": why})
        return goes_on | dict(zip(losses, ray.get(self.control.goes_on.remote(list(losses))), strict=True))


# Distributed trial: a Ray Train run inside the trial's process. Rank 0 hands each report to that process and waits for
# its answer, so that all ranks leave the loop at the same step and Ray Train gives their resources back itself.


def train_distributed_trial(
    job: TrainJob, worker: Mapping[str, float], report: ReportFn, control: Any, trial_id: str
) -> LoopResult:
    """`training.loop.run_steps` on `job.spec.num_workers` workers that have `worker` of the cluster each.

    From their first step the control actor has their placement group. `report` is called here. Raises what it raised,
    after the workers have left their loop; else what `fit_trial` does.
    """
    reports, answers = Queue(actor_options={"num_cpus": 0}), Queue(actor_options={"num_cpus": 0})
    try:
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(fit_trial, job, RemoteReport(reports, answers, control, trial_id), worker)
            error = _answer_reports(run, reports, answers, report)
        if error is not None:
            raise error
        return run.result()
    finally:
        reports.shutdown(force=True)
        answers.shutdown(force=True)


@dataclass
class RemoteReport:
    """The loop's `report` on rank 0. It waits for an answer to a step with a held-out loss only."""

    reports: Any
    answers: Any
    control: Any
    trial_id: str
    placed: bool = False
    """The control actor has the placement group."""

    def __call__(self, step: StepReport) -> bool:
        if not self.placed:  # not step 1: a distributed trial may resume from a checkpoint
            group = get_current_placement_group()
            assert group is not None, "Ray Train places its workers in one"
            ray.get(self.control.hold.remote(self.trial_id, group.id.hex()))
            self.placed = True
        self.reports.put((step, peak_rss_bytes()))
        return step.eval_loss is None or bool(self.answers.get())


def _answer_reports(run: "Future[LoopResult]", reports: Any, answers: Any, report: ReportFn) -> BaseException | None:
    """Answer until the workers have ended; the first error of `report` stops them and is returned."""
    error: BaseException | None = None
    while not (run.done() and reports.empty()):
        try:
            step, peak = reports.get(timeout=POLL_INTERVAL_S)
        except Empty:
            continue
        try:
            goes_on = error is None and report(step, peak)
        except BaseException as raised:  # Tune ends a thread by SystemExit: raised when nobody waits for an answer
            error, goes_on = raised, False
        if step.eval_loss is not None:
            answers.put(goes_on)
    return error
