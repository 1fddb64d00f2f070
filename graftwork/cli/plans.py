"""`graftwork plan FILE`: what a stage will take, printed."""

from typing import TYPE_CHECKING, Annotated

import typer

from graftwork import config
from graftwork.cli.output import JsonFlag, Sets, SpecFile, duration, gib, print_json, print_table, say

if TYPE_CHECKING:
    from graftwork.plan import StagePlan

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
    as_json: JsonFlag = False,
) -> None:
    """Predict memory and time of a stage (or of the whole job) from its spec, before anything starts.

    With --gpu for GPUs that need not be here. The exit code is 2 where a stage does not fit.
    """
    from graftwork.cli.planning import plan_spec
    from graftwork.plan.gpus import named_gpu

    spec = config.load(file, sets)
    rows = plan_spec(spec, file.parent, named_gpu(gpu) if gpu else None, gpus, replay=replay)
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        _show(f"plan of {file}", rows)
    if not all(row.fits for row in rows):
        raise typer.Exit(2)


def _show(title: str, rows: "list[StagePlan]") -> None:
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
            for name, size in sorted(row.parts, key=lambda part: -part[1]):
                say(f"    {name:28s}{gib(size):>10s}")
    for note in dict.fromkeys(note for row in rows for note in row.assumptions):
        say(f"  {note}")
    for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
        say(f"  warning: {warning}")
