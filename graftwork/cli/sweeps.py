"""What `graftwork tune` says before anything starts."""

from pathlib import Path

from graftwork.cli.output import duration, echo, gib
from graftwork.tuning.spec import TuneSpec


def say_plan(spec: TuneSpec, folder: Path, on: str) -> None:
    """One line of what the sweep will take, and a warning where it does not fit. `folder`: where the spec's file lies.

    Raises UserErrors as the sweep itself would.
    """
    from graftwork.cli.planning import plan_spec

    (plan,) = plan_spec(spec, folder)
    here = "" if on == "local" else ", as if it ran on this machine"
    trials, hours = plan.assumptions[:2]
    echo(
        f"predicted{here}: {duration(plan.seconds)}, {gib(plan.peak_bytes_per_process)} a process, "
        f"{gib(plan.total_bytes)} in all, {hours.removesuffix(' in all')} ({trials})"
    )
    if not plan.fits:
        echo(f"  warning: {plan.verdict}")
    for warning in plan.warnings:
        echo(f"  warning: {warning}")
