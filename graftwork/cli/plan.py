"""`graftwork plan FILE`: predictions of memory and time; with --target the price, objects and findings of a job."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork import config
from graftwork.cli.options import ELSEWHERE, LaunchOptions, SpecFile, StageOptions, with_options
from graftwork.cli.render import duration, echo, gib, print_error, print_json, print_table, show_findings
from graftwork.cli.stages import resolve_here
from graftwork.cluster.jobs.backend import usd_per_hour
from graftwork.cluster.jobs.models import Job
from graftwork.cluster.session import FORMS, unknown_place
from graftwork.cluster.spec import quantity
from graftwork.errors import ConfigError
from graftwork.planning.hardware import gpu_key, gpus_of, is_auto
from graftwork.stages.jobs import PlannedJob, plan_job

if TYPE_CHECKING:
    from graftwork.planning.memory import StagePlan
    from graftwork.tuning.spec import TuneSpec

PlanTarget = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="TARGET", help="Plan a job on this target, with its objects, price and preflight findings."
    ),
]

GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="NAME", help="GPU type to plan for: h100, t4, ..., or a YAML file that describes one."
    ),
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Number of workers, each with its own GPU.")]


@with_options
def plan(
    file: SpecFile,
    options: StageOptions,
    gpu: GpuName = None,
    gpus: Gpus = None,
    target: PlanTarget = None,
) -> None:
    """Predict memory and time of a stage, or of all stages of a demo, from its spec. Starts nothing.

    --gpu selects a GPU type that need not be on this machine. --target plans a job and only reads the cluster.
    Exit codes: 2 a stage does not fit or the target would reject the job; 3 the target does not answer.
    """
    if target is not None:
        if gpu or gpus:
            raise ConfigError(
                "--gpu, --gpus with --target",
                "a job is planned for the machines of its cluster",
                "the cluster config names them: workers[].gpu_type",
                "remove --target, or the other flags",
            )
        if target != "local" and not target.startswith(ELSEWHERE):
            raise unknown_place(target, f"a plan with --target is of a job: {FORMS}")
        _plan_job(file, LaunchOptions(**vars(options), target=target, detach=True))
        return
    if given := options.job_flags():
        raise ConfigError(
            f"{', '.join(given)} without --target",
            "it would have no effect",
            "a cluster config and limits apply to a job",
            "add --target k8s:CONTEXT/NAMESPACE, or --target http://HEAD:8265",
        )
    from graftwork.planning.hardware import named_gpu
    from graftwork.stages.plans import plan_spec

    spec = config.load(file, options.sets)
    if gpu is None:
        spec = resolve_here(spec, "local", options.as_json)
    elif not options.as_json and (key := gpu_key(spec)) is not None:
        if gpus_of(spec) == 0 and not is_auto(spec):
            echo(f"note: planned with {key}=1; the file has {key}=0, which computes on the CPU: set {key}=1, or auto")
        else:
            echo(f"note: {key}={gpus_of(spec) or 1:g} (--gpu {gpu})")
    rows = plan_spec(spec, file.parent, named_gpu(gpu) if gpu else None, gpus)
    show_plan(f"plan of {file}", rows, options.as_json)


def show_plan(title: str, rows: "Sequence[StagePlan]", as_json: bool) -> None:
    """Print a plan; exits with 2 where a stage does not fit."""
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        _show(title, rows)
    if not all(row.fits for row in rows):
        raise typer.Exit(2)


def _plan_job(file: Path, options: LaunchOptions) -> None:
    assert options.is_job, "a plan with --target is of a job"
    whole = plan_job(config.load(file, options.sets), file.parent, options.target, options.cluster_spec())
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


def show_job_plan(whole: PlannedJob) -> None:
    """Print the plan of a job below the table of stages."""
    job, plan, cluster = whole.job, whole.plan, whole.job.cluster
    there = "is there already: submitting finds it" if plan.exists else "new"
    facts = {
        "job": f"{plan.job_id} attempt {plan.attempt} on {whole.on} ({there})",
        "store": job.root,
        "workers": _workers(job),
        "resolved": whole.resolved,
        "sends": ", ".join(f"{one.path.name} ({gib(one.bytes)})" for one in job.inputs) or None,
        "machines": _machines(job) if whole.on.startswith("k8s:") else None,
        "time": None
        if job.demand.seconds is None
        else f"{duration(job.demand.seconds)} predicted"
        + (f", {plan.gpu_hours:.2f} GPU-hours" if plan.gpu_hours else ""),
        "price": _price(whole),
        "limits": f"pending {duration(cluster.limits.pending)}, deadline "
        + ("none" if cluster.limits.deadline is None else duration(cluster.limits.deadline)),
        "objects": ", ".join(f"{o['kind']} {o['metadata']['name']}" for o in plan.objects) or None,
    }
    for name, value in facts.items():
        if value is not None:
            echo(f"  {name:9s} {value}")
    if plan.objects:
        echo(plan.diff or "  nothing would change")
    show_findings(plan.findings)


def _workers(job: Job) -> str:
    demand = job.demand
    each = [f"{demand.cpus_per_worker:g} CPU"]
    of_gpu = f" ({gib(demand.gpu_memory_bytes_per_worker)} of it)" if demand.gpu_memory_bytes_per_worker else ""
    each += [f"{demand.gpus_per_worker:g} GPU{of_gpu}"] if demand.gpus_per_worker else []
    each += [gib(demand.memory_bytes_per_worker)] if demand.memory_bytes_per_worker else []
    return f"{demand.num_workers} x ({', '.join(each)})"


def _machines(job: Job) -> str:
    head = f"head {job.cluster.head.cpu} CPU {job.cluster.head.memory}"
    groups = [
        f"{group.name} {group.count} x ({group.cpu} CPU, {group.memory}"
        + (f", {group.gpu} {group.gpu_type or 'GPU'}" if group.gpu else "")
        + (", spot)" if group.spot else ")")
        for group in job.cluster.workers
    ]
    cpus = quantity(job.cluster.head.cpu) + sum(quantity(g.cpu) * g.count for g in job.cluster.workers)
    gpus = sum(g.gpu * g.count for g in job.cluster.workers)
    return f"{'; '.join([head, *groups])}: {cpus:g} CPU, {gpus} GPU in all"


def _price(whole: PlannedJob) -> str:
    plan, cluster = whole.plan, whole.job.cluster
    hour = usd_per_hour(cluster)
    if hour is None:
        lacks = "no prices" if cluster.prices is None else "no price of a GPU type"
        return f"not known: the cluster's file has {lacks}"
    predicted = "not predicted" if plan.usd is None else f"${plan.usd:.2f} predicted"
    most = "no limit of it" if plan.most_usd is None else f"at most ${plan.most_usd:.2f}"
    by = ""
    if plan.most_usd is not None:
        by = " (budget)" if plan.most_usd == cluster.limits.budget_usd else " (deadline)"
    return f"{predicted}; {most}{by}; ${hour:.2f} an hour"


def print_prediction(spec: "TuneSpec", folder: Path, on: str) -> None:
    """Print one line with the prediction of the sweep, and a warning where it does not fit. `folder`: the spec file's.

    Raises UserErrors as the sweep itself would.
    """
    from graftwork.stages.plans import plan_spec

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
