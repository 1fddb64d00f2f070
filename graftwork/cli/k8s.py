"""`graftwork k8s render FILE`: the objects of a job as YAML, with no cluster in reach."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
import yaml

from graftwork import config
from graftwork.cli.demands import demand_of, planned
from graftwork.cli.launching import cluster_of, job_of
from graftwork.cli.output import Cluster, Sets, SpecFile
from graftwork.cluster.backend import Attempt, Job
from graftwork.storage import Store

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
    attempt: Annotated[int, typer.Option("--attempt", min=1, help="Number of the attempt, part of a job's name.")] = 1,
    publish: Annotated[
        bool, typer.Option("--publish", help="Lay this code into the store too, where `code: wheel` looks for it.")
    ] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Print the objects of FILE as YAML: a RayJob, for an endpoint a RayService. Reaches no cluster.

    The next version of a serve spec is the same RayService: `kubectl apply` changes it in place.
    """
    spec, place = config.load(file, sets), cluster_of(cluster)
    lines, _ = planned(spec, file.parent, place)
    job = replace(job_of(spec, place), demand=demand_of(spec, lines))
    if publish and place.code == "wheel":
        from graftwork.cluster.wheel import publish_wheel

        publish_wheel(Store(job.root))
    objects = _service(job, namespace) if job.kind == "serve" else _attempt(Attempt(job, attempt), namespace)
    sys.stdout.write(yaml.safe_dump_all([dict(one) for one in objects], sort_keys=False, width=120))


def _attempt(attempt: Attempt, namespace: str) -> Sequence[Mapping[str, Any]]:
    from graftwork.cluster.places.kuberay import KubeRayPlace

    return KubeRayPlace(f"k8s:{NOWHERE}/{namespace}", attempt.job.root, attempt.job.cluster).objects(attempt)


def _service(job: Job, namespace: str) -> Sequence[Mapping[str, Any]]:
    from graftwork.cluster.kuberay.rayservice import service_objects
    from graftwork.cluster.wheel import wheel_uri

    uri = wheel_uri(Store(job.root)) if job.cluster.code == "wheel" else None
    return service_objects(job, namespace, uri)
