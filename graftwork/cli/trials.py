"""`graftwork trial FILE`: what the driver of a trial runs, where each trial of a sweep is a job."""

from graftwork import config
from graftwork.cli.options import SpecFile, Target
from graftwork.cli.output import echo
from graftwork.cluster.address import JOB


def trial(file: SpecFile, target: Target = JOB) -> None:
    """Train one trial of a sweep. The sweep reads its progress from the object store."""
    from graftwork.cluster.session import session
    from graftwork.tuning.trial_spec import TrialSpec

    spec = config.load(file, expect="trial")
    assert isinstance(spec, TrialSpec)
    from graftwork.tuning.trial_run import run_trial_job

    with session(target, needs_ray=spec.train.num_workers > 1) as here:
        result = here.run(run_trial_job, spec)
    losses = f"held-out loss {result.eval_loss[-1][1]:.4f}" if result.eval_loss else "no held-out loss"
    echo(f"trial {spec.trial_id} of {spec.sweep}: {result.steps} steps, {losses}")
