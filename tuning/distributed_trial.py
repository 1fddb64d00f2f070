"""Distributed trial: a Ray Train run inside the trial's process. Rank 0 hands each report to that process and waits
for its answer, so that all ranks leave the loop at the same step and Ray Train gives their places back itself."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from graftwork.environment import peak_rss_bytes
from graftwork.training.ray_worker import fit_trial
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob

POLL_INTERVAL_S = 0.5
"""Between two looks whether the workers have ended without a report."""

ReportFn = Callable[[StepReport, int], bool]
"""A step's report and the largest resident set of rank 0's process; whether to go on."""


def train_distributed_trial(
    job: TrainJob, worker: Mapping[str, float], report: ReportFn, board: Any, trial_id: str
) -> LoopResult:
    """`training.loop.run_steps` on `job.spec.num_workers` workers that have `worker` of the cluster each.

    From their first step the board knows what they hold. `report` is called here. Raises what it raised, after the
    workers have left their loop; else what `fit_trial` does.
    """
    from ray.util.queue import Queue

    told, answers = Queue(actor_options={"num_cpus": 0}), Queue(actor_options={"num_cpus": 0})
    try:
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(fit_trial, job, RemoteReport(told, answers, board, trial_id), worker)
            error = _answered(run, told, answers, report)
        if error is not None:
            raise error
        return run.result()
    finally:
        told.shutdown(force=True)
        answers.shutdown(force=True)


@dataclass
class RemoteReport:
    """The loop's `report` on rank 0. Steps without a held-out loss are told and not waited for."""

    told: Any
    answers: Any
    board: Any
    trial_id: str
    placed: bool = False
    """Whether the board knows the placement group."""

    def __call__(self, step: StepReport) -> bool:
        if not self.placed:  # not step 1: a gang may go on from a checkpoint
            self._say_where()
            self.placed = True
        self.told.put((step, peak_rss_bytes()))
        return step.eval_loss is None or bool(self.answers.get())

    def _say_where(self) -> None:
        import ray
        from ray.util import get_current_placement_group

        group = get_current_placement_group()
        assert group is not None, "Ray Train places its workers in one"
        ray.get(self.board.hold.remote(self.trial_id, group.id.hex()))


def _answered(run: "Future[LoopResult]", told: Any, answers: Any, report: ReportFn) -> BaseException | None:
    """Answer until the workers have ended; the first error of `report` stops them and is returned."""
    from ray.util.queue import Empty

    error: BaseException | None = None
    while not (run.done() and told.empty()):
        try:
            step, peak = told.get(timeout=POLL_INTERVAL_S)
        except Empty:
            continue
        try:
            goes_on = error is None and report(step, peak)
        except BaseException as raised:  # Tune ends a thread by SystemExit: raised when nobody waits for an answer
            error, goes_on = raised, False
        if step.eval_loss is not None:
            answers.put(goes_on)
    return error
