"""`graftwork k8s render FILE`: the objects of a job as YAML, with no cluster in reach."""

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
import yaml

from graftwork import config
from graftwork.cli.launch import cluster_of, job_of, with_demand
from graftwork.cli.options import ClusterConfig, Sets, SpecFile
from graftwork.cli.render import stderr
from graftwork.cluster.jobs.models import Attempt, Job
from graftwork.cluster.kuberay.preflight import machines_of
from graftwork.planning.accelerators import with_gpus
from graftwork.storage.store import Store

app = typer.Typer(help="Render the Kubernetes objects of a job or endpoint.", no_args_is_help=True)
NOWHERE = "render"
"""Stands for the context: none is opened."""


@app.callback()
def k8s() -> None:
    """Render the Kubernetes objects of a job or endpoint."""


@app.command()
def render(
    file: SpecFile,
    cluster_config: ClusterConfig = None,
    namespace: Annotated[str, typer.Option("--namespace", help="Namespace of the objects.")] = "default",
    attempt: Annotated[int, typer.Option("--attempt", min=1, help="Attempt number; part of the RayJob name.")] = 1,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish", help="Also upload this code (`code: wheel`) and local data files to the object store."
        ),
    ] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Print the Kubernetes objects of FILE as YAML, without access to a cluster.

    A serve spec becomes a RayService, any other stage a RayJob. A changed serve spec keeps the name of its RayService,
    so `kubectl apply` updates the running service in place.
    """
    spec, place = config.load(file, sets), cluster_of(cluster_config)
    machines = machines_of(place)
    spec, chosen = with_gpus(spec, machines.accelerators)
    job, _, _ = with_demand(job_of(spec, place, f"k8s:{NOWHERE}/{namespace}"), spec, file.parent, machines)
    if chosen is not None:
        stderr.print(f"note: {chosen}", markup=False, soft_wrap=True)
    if publish:
        _publish(job)
    objects = _service(job, namespace) if job.kind == "serve" else _attempt(Attempt(job, attempt), namespace)
    sys.stdout.write(yaml.safe_dump_all([dict(one) for one in objects], sort_keys=False, width=120))


def _publish(job: Job) -> None:
    """Put the code and the job's local rows into the store, where the objects look for them."""
    from graftwork.cluster.jobs.inputs import send
    from graftwork.cluster.jobs.packaging import publish_wheel

    store = Store(job.root)
    if job.cluster.code == "wheel":
        publish_wheel(store)
    for one in job.inputs:
        send(store, one)


def _attempt(attempt: Attempt, namespace: str) -> Sequence[Mapping[str, Any]]:
    from graftwork.cluster.targets.kuberay import KubeRayTarget

    return KubeRayTarget(f"k8s:{NOWHERE}/{namespace}", attempt.job.root, attempt.job.cluster).objects(attempt)


def _service(job: Job, namespace: str) -> Sequence[Mapping[str, Any]]:
    from graftwork.cluster.jobs.packaging import wheel_uri
    from graftwork.cluster.kuberay.objects import service_objects

    uri = wheel_uri(Store(job.root)) if job.cluster.code == "wheel" else None
    return service_objects(job, namespace, uri)
