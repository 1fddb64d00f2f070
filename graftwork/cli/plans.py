"""`graftwork plan FILE`: what a stage will take, printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork import config
from graftwork.accelerators import gpu_key, gpus_of, is_auto
from graftwork.cli.launching import ELSEWHERE, Budget, Deadline, Launch, Pending, resolve_here
from graftwork.cli.output import (
    Cluster,
    JsonFlag,
    Sets,
    SpecFile,
    duration,
    gib,
    print_error,
    print_json,
    print_table,
    say,
)
from graftwork.cluster.address import FORMS, unknown_place
from graftwork.config import Spec
from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftwork.plan import StagePlan

Where = Annotated[
    str | None,
    typer.Option("--on", metavar="WHERE", help="Plan it as a job there: objects, price and every finding as well."),
]

GpuName = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="Plan for such GPUs: h100, t4, ..., or a YAML file.")
]
Replay = Annotated[
    bool, typer.Option("--replay", help="Take the real step on tensors without memory as well: some 10 s for 8B.")
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Workers, each with a GPU of its own.")]


def plan(
    file: SpecFile,
    gpu: GpuName = None,
    gpus: Gpus = None,
    replay: Replay = False,
    sets: Sets = [],  # noqa: B006
    on: Where = None,
    cluster: Cluster = None,
    deadline: Deadline = None,
    budget: Budget = None,
    pending: Pending = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict memory and time of a stage (or of the whole job) from its spec, before anything starts.

    With --gpu for GPUs that need not be here; with --on as a job of a place, which is asked and left as it is. The exit
    code is 2 where a stage does not fit or the place would refuse it, 3 where the place does not answer.
    """
    if on is not None:
        if gpu or gpus or replay:
            raise ConfigError("--gpu, --gpus, --replay with --on", "a job is planned for its cluster's machines",
                              "the cluster's file names them: workers[].gpu_type", "leave one of them out")  # fmt: skip
        if on != "local" and not on.startswith(ELSEWHERE):
            raise unknown_place(on, f"a plan with --on is of a job: {FORMS}")
        return _plan_job(file, sets, Launch(on, True, cluster, deadline, budget, pending), as_json)
    flags = {"--cluster": cluster, "--deadline": deadline, "--budget": budget, "--pending": pending}
    if given := [flag for flag, value in flags.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)} without --on", "it would have no effect", "a cluster's file and limits "
                          "are a job's", "add --on k8s:CONTEXT/NAMESPACE, or --on http://HEAD:8265")  # fmt: skip
    from graftwork.cli.planning import plan_spec
    from graftwork.plan.gpus import named_gpu

    spec = config.load(file, sets)
    if gpu is None:
        spec = resolve_here(spec, "local", as_json)
    elif not as_json:
        _say_gpus(spec, gpu)
    rows = plan_spec(spec, file.parent, named_gpu(gpu) if gpu else None, gpus, replay=replay)
    show_plan(f"plan of {file}", rows, as_json)


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
        say(f"note: planned with {key}=1; the file has {key}=0, which computes on the CPU: set {key}=1, or auto")
    else:
        say(f"note: {key}={gpus_of(spec) or 1:g} (--gpu {gpu})")


def _plan_job(file: Path, sets: list[str], how: Launch, as_json: bool) -> None:
    from graftwork.cli.job_plans import plan_job, show_job_plan

    assert how.elsewhere, "a plan with --on is a job's"
    whole = plan_job(config.load(file, sets), file.parent, how)
    if as_json:
        print_json(whole.as_dict())
    else:
        if whole.lines:
            _show(f"plan of {file}", whole.lines)
        show_job_plan(whole)
    if whole.unheard is not None:
        print_error(whole.unheard, as_json)
        raise typer.Exit(whole.unheard.exit_code)
    if whole.refused or (how.on == "local" and not all(row.fits for row in whole.lines)):
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
            say(f"  {row.stage}: {row.verdict}")
        if row.step_s is not None:
            say(f"  {row.stage}: {row.step_s:.2f} s a step; one worker takes")
            width = max(26, *(len(name) for name, _ in row.parts)) + 2
            for name, size in sorted(row.parts, key=lambda part: -part[1]):
                say(f"    {name:{width}s}{gib(size):>10s}")
    for note in dict.fromkeys(note for row in rows for note in row.assumptions):
        say(f"  {note}")
    for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
        say(f"  warning: {warning}")
