"""A trial as a job, where the work is: trained like a run, with a checkpoint at each report, and nothing published."""

from graftwork import base_model
from graftwork.cluster.fence import Fence
from graftwork.training.data import prepare
from graftwork.training.fit import fit
from graftwork.training.job import LoopResult, TrainJob
from graftwork.training.lock import OVERTAKES_S, run_lock
from graftwork.training.settled import resolve_auto_for_run
from graftwork.tuning.trial_spec import TrialSpec


def run_trial_job(spec: TrialSpec) -> LoopResult:
    """Train to the trial's last step; needs an initialised Ray. Goes on from its newest checkpoint.

    Raises what `training.run.train` does.
    """
    kept = {"checkpoint_every": spec.report_every, "checkpoints": {"keep_last": 1}}
    asked, paths = spec.train.with_(kept), spec.paths().patiently(spec.train.checkpoints.outage_s)
    base, data, fence = base_model.resolve(asked.base), prepare(asked), Fence.from_environment()
    with run_lock(paths, wait_s=OVERTAKES_S if fence is not None else 0.0):
        train, _ = resolve_auto_for_run(asked, base, data.train, paths)
        job = TrainJob(train, data, run=paths, max_steps=spec.steps, eval_every=spec.report_every, fence=fence)
        return fit(job)
