"""Trials as jobs of a target, one each: a distributed trial waits in the cluster's queue and reserves nothing.

The sweep's driver stays here with a Ray of its own. The process that Tune gives a trial submits the job, reads its
steps from the store, reports them, and cancels it when it is to stop. The job has a checkpoint at each report.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from graftwork.base import load as base_model
from graftwork.base import source
from graftwork.base.model_shape import ModelShape
from graftwork.cluster.jobs.fencing import Fence
from graftwork.cluster.jobs.models import Demand, Job, JobBackend, TargetMachines
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets import backend_of
from graftwork.errors import ClusterError, ConfigError, RunError
from graftwork.planning.hardware import Accelerators
from graftwork.storage.store import RunPaths
from graftwork.training.autotune import resolve_auto_for_run, sizes_of
from graftwork.training.objectives.rows import prepare
from graftwork.training.planning.plan import plan_training
from graftwork.training.ray_worker import fit
from graftwork.training.run_lock import OVERTAKES_S, run_lock
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob, read_steps
from graftwork.tuning.forkserver import ReportFn
from graftwork.tuning.search_pbt import PbtSpec
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial_store import TRIALS, TrialSpec

POLL_INTERVAL_S = 1.0
KIND = "trial"
AT_ONCE = 16
"""Cancellations."""


@dataclass(frozen=True)
class Elsewhere:
    """Target of trials that are jobs. `cluster` is a ClusterSpec's dump: it is sent to the trials' processes."""

    on: str
    cluster: dict[str, Any]

    def backend(self, root: str) -> JobBackend:
        """Backend of the target."""
        return backend_of(self.on, root, ClusterSpec.model_validate(self.cluster))

    def machines(self, root: str) -> TargetMachines:
        """Machines of the target. Raises ClusterError where it does not answer."""
        return self.backend(root).machines(ClusterSpec.model_validate(self.cluster))

    def accelerators(self, root: str) -> Accelerators:
        """GPUs of the target."""
        return self.machines(root).accelerators


def check_elsewhere(spec: TuneSpec) -> None:
    """Raises ConfigError for a sweep whose trials can't be jobs."""
    asked = {"share_base": spec.share_base > 1, "search.kind=pbt": isinstance(spec.search, PbtSpec)}
    for key, given in asked.items():
        if given:
            raise ConfigError(
                f"--trial-target with {key}",
                "such trials share a process or go on from each other's checkpoints",
                "a trial that is a job of its own stands alone",
                f"leave {key} out, or run the sweep with --target",
            )


def trial_job(where: Elsewhere, job: TrainJob, trial_id: str, sweep: RunPaths) -> Job:
    """The job of a trial. Equal trials are one job: a sweep that goes on finds those that still run."""
    assert job.max_steps is not None
    assert job.eval_every is not None
    placed = job.spec.with_({"root": sweep.store.uri, "base.uri": source.absolute(job.spec.base.uri)})
    spec = TrialSpec(
        name=f"{sweep.run_id}-{trial_id}".lower(),
        root=sweep.store.uri,
        sweep=sweep.name,
        sweep_digest=sweep.digest,
        trial_id=trial_id,
        train=placed,
        steps=job.max_steps,
        report_every=job.eval_every,
    )
    cluster = ClusterSpec.model_validate(where.cluster)
    demand = _demand(job, placed, where.machines(spec.root))
    return Job(spec.name, KIND, spec.identity(), spec.root, spec.model_dump(mode="json"), cluster, demand)


def train_elsewhere(where: Elsewhere, job: TrainJob, trial_id: str, sweep: RunPaths, report: ReportFn) -> None:
    """Run the trial as a job and hand on its reports; return when it has ended or must stop.

    Raises RunError for one that failed or was lost, what `report` raises, and the target's errors at submission.
    """
    asked = trial_job(where, job, trial_id, sweep)
    backend, paths, shown = where.backend(asked.root), sweep.part(TRIALS, trial_id), 0
    status = backend.submit(asked)
    try:
        while True:
            ended = status.ended  # read before the steps, so that the last steps are not missed
            for step in read_steps(paths):
                if step.step > shown:
                    shown = step.step
                    if not report(step, 0):
                        backend.cancel(asked.job_id)
                        return
            if ended:
                break
            time.sleep(POLL_INTERVAL_S)
            with contextlib.suppress(ClusterError):  # the target does not answer: the job continues without us
                status = backend.status(asked.job_id)
    except BaseException:  # Tune ends this thread by SystemExit; after any error no process waits for the job
        backend.cancel(asked.job_id)
        raise
    if status.state != "succeeded":
        raise RunError(
            f"trial job {status.job_id}", f"{status.state}: {status.why}", "", f"graftwork jobs logs {status.job_id}"
        )


def end_trials(where: Elsewhere, sweep: RunPaths) -> int:
    """Cancel the trials of a sweep that still run, whose processes here may have been killed; return their number."""
    backend, prefix = where.backend(sweep.store.uri), f"{sweep.run_id}-".lower()
    left = [one for one in backend.list() if one.kind == KIND and not one.ended and one.job_id.startswith(prefix)]
    with ThreadPoolExecutor(AT_ONCE) as pool:  # each cancellation waits for the grace of its trial's pods
        list(pool.map(lambda one: backend.cancel(one.job_id), left))
    return len(left)


def _demand(job: TrainJob, spec: TrainSpec, machines: TargetMachines) -> Demand:
    """Return what the trial's workers take by its plan on the target's machines; no memory where none is predicted."""
    machine = machines.planned_for(spec.gpus)
    shape = ModelShape.from_config(base_model.resolve(spec.base).config)
    if machine is None or shape.unplanned:
        return Demand(spec.num_workers, spec.cpus_per_worker, spec.gpus)
    line = plan_training(spec, shape, sizes_of(job.data.train), None, machine.at(spec.quant))
    peak, host = line.peak_bytes_per_process, line.host_bytes_per_process
    memory = (host, peak) if spec.gpus else (peak, 0)
    return Demand(spec.num_workers, spec.cpus_per_worker, spec.gpus, memory[0], None, memory[1])


# The job of a trial, on the target: trained like a run, with a checkpoint at each report, and nothing published.


def run_trial_job(spec: TrialSpec) -> LoopResult:
    """Train to the trial's last step, from its newest checkpoint; needs an initialised Ray.

    Raises what `training.run.train` does.
    """
    checkpoints = {"checkpoint_every": spec.report_every, "checkpoints": {"keep_last": 1}}
    asked, paths = spec.train.with_(checkpoints), spec.paths().patiently(spec.train.checkpoints.outage_s)
    base, data, fence = base_model.resolve(asked.base), prepare(asked), Fence.from_environment()
    with run_lock(paths, wait_s=OVERTAKES_S if fence is not None else 0.0):
        train, _ = resolve_auto_for_run(asked, base, data.train, paths)
        job = TrainJob(train, data, run=paths, max_steps=spec.steps, eval_every=spec.report_every, fence=fence)
        return fit(job)
