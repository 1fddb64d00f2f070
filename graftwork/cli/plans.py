"""`graftwork plan FILE`: what a stage will take, printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork import config
from graftwork.accelerators import gpu_key, gpus_of, is_auto
from graftwork.cli.launching import ELSEWHERE, LaunchOptions, StageOptions, resolve_here
from graftwork.cli.options import SpecFile, with_options
from graftwork.cli.output import duration, echo, gib, print_error, print_json, print_table
from graftwork.cluster.address import FORMS, unknown_place
from graftwork.config import Spec
from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftwork.plan import StagePlan

PlanTarget = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="TARGET", help="Plan a job on this target, with its objects, price and preflight findings."
    ),
]

GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="NAME", help="Plan for this GPU type: h100, t4, ..., or a YAML file that describes one."
    ),
]
Replay = Annotated[
    bool,
    typer.Option(
        "--replay", help="Also trace one training step on fake tensors to predict memory (about 10 s for an 8B base)."
    ),
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Number of workers, each with its own GPU.")]


@with_options
def plan(
    file: SpecFile,
    options: StageOptions,
    gpu: GpuName = None,
    gpus: Gpus = None,
    replay: Replay = False,
    target: PlanTarget = None,
) -> None:
    """Predict memory and time of a stage, or of all stages of a demo, from its spec. Starts nothing.

    --gpu plans for a GPU type that this machine need not have. --target plans a job on a cluster, which is read but not
    changed. Exit codes: 2 a stage does not fit or the target would reject the job; 3 the target does not answer.
    """
    if target is not None:
        if gpu or gpus or replay:
            raise ConfigError(
                "--gpu, --gpus, --replay with --target", "a job is planned for the machines of its cluster",
                "the cluster config names them: workers[].gpu_type", "remove --target, or the other flags",
            )  # fmt: skip
        if target != "local" and not target.startswith(ELSEWHERE):
            raise unknown_place(target, f"a plan with --target is of a job: {FORMS}")
        return _plan_job(file, LaunchOptions(**vars(options), target=target, detach=True))
    if given := options.job_flags():
        raise ConfigError(
            f"{', '.join(given)} without --target", "it would have no effect",
            "a cluster config and limits apply to a job",
            "add --target k8s:CONTEXT/NAMESPACE, or --target http://HEAD:8265",
        )  # fmt: skip
    from graftwork.cli.planning import plan_spec
    from graftwork.plan.gpus import named_gpu

    spec = config.load(file, options.sets)
    if gpu is None:
        spec = resolve_here(spec, "local", options.as_json)
    elif not options.as_json:
        _say_gpus(spec, gpu)
    rows = plan_spec(spec, file.parent, named_gpu(gpu) if gpu else None, gpus, replay=replay)
    show_plan(f"plan of {file}", rows, options.as_json)


def show_plan(title: str, rows: "Sequence[StagePlan]", as_json: bool) -> None:
    """Print a plan; exits with 2 where a stage does not fit."""
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        _show(title, rows)
    if not all(row.fits for row in rows):
        raise typer.Exit(2)


def _say_gpus(spec: Spec, gpu: str) -> None:
    """Print the keys that the spec needs to run as it is planned here."""
    key = gpu_key(spec)
    if key is None:
        return
    if gpus_of(spec) == 0 and not is_auto(spec):
        echo(f"note: planned with {key}=1; the file has {key}=0, which computes on the CPU: set {key}=1, or auto")
    else:
        echo(f"note: {key}={gpus_of(spec) or 1:g} (--gpu {gpu})")


def _plan_job(file: Path, options: LaunchOptions) -> None:
    from graftwork.cli.job_plans import plan_job, show_job_plan

    assert options.elsewhere, "a plan with --target is of a job"
    whole = plan_job(config.load(file, options.sets), file.parent, options)
    if options.as_json:
        print_json(whole.as_dict())
    else:
        if whole.lines:
            _show(f"plan of {file}", whole.lines)
        show_job_plan(whole)
    if whole.unheard is not None:
        print_error(whole.unheard, options.as_json)
        raise typer.Exit(whole.unheard.exit_code)
    if whole.refused or (options.target == "local" and not all(row.fits for row in whole.lines)):
        raise typer.Exit(2)


def _show(title: str, rows: "Sequence[StagePlan]") -> None:
    print_table(
        title,
        ("stage", "processes", "peak each", "peak in all", "time", "fits"),
        [
            (
                r.stage,
                r.processes,
                gib(r.peak_bytes_per_process),
                gib(r.total_bytes),
                duration(r.seconds),
                "yes" if r.fits else "no",
            )
            for r in rows
        ],
    )
    for row in rows:
        if not row.fits:
            echo(f"  {row.stage}: {row.verdict}")
        if row.step_s is not None:
            echo(f"  {row.stage}: {row.step_s:.2f} s a step; one worker takes")
            width = max(26, *(len(name) for name, _ in row.parts)) + 2
            for name, size in sorted(row.parts, key=lambda part: -part[1]):
                echo(f"    {name:{width}s}{gib(size):>10s}")
    for note in dict.fromkeys(note for row in rows for note in row.assumptions):
        echo(f"  {note}")
    for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
        echo(f"  warning: {warning}")
