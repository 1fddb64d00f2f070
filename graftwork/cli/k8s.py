"""`graftwork k8s render FILE`: the objects of a job as YAML, with no cluster in reach."""

import sys
from dataclasses import replace
from typing import Annotated

import typer
import yaml

from graftwork import config
from graftwork.cli.demands import demand_of, planned
from graftwork.cli.launching import cluster_of, job_of
from graftwork.cli.output import Cluster, Sets, SpecFile
from graftwork.cluster.backend import Attempt

app = typer.Typer(help="What a Kubernetes cluster would be given.", no_args_is_help=True)
NOWHERE = "render"
"""Stands for the context: none is opened."""


@app.callback()
def k8s() -> None:
    """What a Kubernetes cluster would be given."""


@app.command()
def render(
    file: SpecFile,
    cluster: Cluster = None,
    namespace: Annotated[str, typer.Option("--namespace", help="Of the objects.")] = "default",
    attempt: Annotated[int, typer.Option("--attempt", min=1, help="Number of the attempt, part of the name.")] = 1,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Print the objects that submitting FILE would make, as YAML. Reaches nothing and writes nothing."""
    from graftwork.cluster.places.kuberay import KubeRayPlace

    spec, place = config.load(file, sets), cluster_of(cluster)
    lines, _ = planned(spec, file.parent, place)
    job = replace(job_of(spec, place), demand=demand_of(spec, lines))
    objects = KubeRayPlace(f"k8s:{NOWHERE}/{namespace}", job.root, place).objects(Attempt(job, attempt))
    sys.stdout.write(yaml.safe_dump_all([dict(one) for one in objects], sort_keys=False, width=120))
