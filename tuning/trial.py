"""The process of a trial, or of several together: the loop of `train`, which reports held-out losses to Ray Tune."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune

from graftwork.environment import peak_rss_bytes
from graftwork.errors import RunError
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import PreparedData
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import NonFiniteLoss, StepReport, TrainJob, read_steps
from graftwork.tuning.distributed_trial import ReportFn, train_distributed_trial
from graftwork.tuning.forkserver import train_in_fork
from graftwork.tuning.remote_trial import Elsewhere, train_elsewhere
from graftwork.tuning.resources import is_distributed
from graftwork.tuning.retry import message_of
from graftwork.tuning.trial_store import TrialPaths
from graftwork.tuning.trials import Costs


@dataclass(frozen=True)
class TrialConfig:
    """Config that Tune passes to one process, made of plain values."""

    trials: dict[str, str]
    """The resolved training spec of each trial, as JSON, by trial id."""
    rows: str
    """Key of their rows."""
    asks: list[dict[str, float]]
    """What Tune reserves: one bundle, that of this process."""
    worker: dict[str, float]
    """What Ray Train reserves for each worker of a gang; of no use to another trial."""
    until: int | None = None
    """Step that a single trial ends at, before the sweep's last, with a checkpoint for others to begin from."""
    parent: str | None = None
    """The trial that it begins from."""

    def config(self) -> dict[str, Any]:
        """For Tune."""
        return dict(vars(self))


def run_trial(
    config: Mapping[str, Any],
    rows: Mapping[str, PreparedData],
    steps: int,
    report_every: int,
    board: Any,
    places: TrialPaths,
    elsewhere: Elsewhere | None = None,
) -> None:
    """Tune's function trainable; `config` is a `TrialConfig`. Runs in a Tune actor process.

    A trial that is to stop reads it on the board after its report, and leaves. Raises NonFiniteLoss for one that is
    trained alone; of several the one that diverges leaves.
    """
    asked = TrialConfig(**config)
    specs = {trial_id: TrainSpec.model_validate_json(text) for trial_id, text in asked.trials.items()}
    jobs = {
        key: TrainJob(spec, rows[asked.rows], max_steps=steps, eval_every=report_every) for key, spec in specs.items()
    }
    reporter = _TuneReporter(specs, board)
    if len(jobs) > 1:
        from graftwork.tuning.multi_lora.train import run_together  # imports torch, which the driver need not have

        run_together(jobs, lambda steps, lost: reporter.report(steps, lost, peak_rss_bytes()))
        return
    ((trial_id, job),) = jobs.items()
    if elsewhere is not None:
        train_elsewhere(elsewhere, job, trial_id, places.sweep, _finite(trial_id, reporter))
        return
    _run_alone(
        places.job(job, trial_id, asked.until, asked.parent), asked.worker, trial_id, asked.until or steps, reporter
    )


def _finite(trial_id: str, reporter: "_TuneReporter") -> ReportFn:
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
    report_finite = _finite(trial_id, reporter)

    def report(step: StepReport, peak: int) -> bool:
        if job.run is None or step.step < end or not _is_finite(step):
            return report_finite(step, peak)
        last.append((step, peak))
        return False

    done = Checkpoints(job.run).newest() if job.run is not None else None
    if job.run is not None and done is not None and done.step >= end:  # an earlier attempt was lost before it told
        last += [(step, peak_rss_bytes()) for step in read_steps(job.run) if step.step == done.step]
    else:
        _train(job, worker, report, reporter.board, trial_id)
    for step, peak in last:
        reporter.report({trial_id: step}, {}, peak)


def _is_finite(step: StepReport) -> bool:
    return step.eval_loss is None or math.isfinite(step.eval_loss)


def _train(job: TrainJob, worker: Mapping[str, float], report: ReportFn, board: Any, trial_id: str) -> None:
    """Train with distributed workers, in this process on a GPU, or in a fork."""
    if is_distributed(job.spec):
        train_distributed_trial(job, worker, report, board, trial_id)
    elif job.spec.gpus:
        run_steps(job, lambda step: report(step, peak_rss_bytes()))
    else:
        train_in_fork(job, report)


class _TuneReporter:
    """Reports the trials of this process to Tune, and reads from the board which of them continue."""

    def __init__(self, specs: Mapping[str, TrainSpec], board: Any) -> None:
        self._costs = {trial_id: Costs(spec) for trial_id, spec in specs.items()}
        self.board = board

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
        return goes_on | dict(zip(losses, ray.get(self.board.goes_on.remote(list(losses))), strict=True))
