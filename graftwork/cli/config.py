"""`graftwork config check|show|schema` and `graftwork k8s render`: a spec checked, explained, or as Kubernetes objects.

Nothing is started and no cluster is read.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from graftwork import config
from graftwork.base.support import check_local
from graftwork.cli import options
from graftwork.cli.options import ClusterConfig, JsonFlag, Sets, cluster_of
from graftwork.cli.render import echo, note, print_json, print_table
from graftwork.cluster.jobs.models import Attempt, Job
from graftwork.cluster.kuberay.preflight import machines_of
from graftwork.errors import ConfigError
from graftwork.planning.hardware import with_gpus
from graftwork.stages.jobs import job_of, with_demand
from graftwork.storage.store import Store

app = typer.Typer(help="Validate, resolve and describe spec files.", no_args_is_help=True)
SpecFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML spec; its `kind` names the stage.")]


@app.command()
def check(file: SpecFile, sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006 (typer copies it)
    """Validate a spec. Exits with 2 and lists each wrong key with its value, the rule and the nearest known key.

    Where the base is a folder of this machine, also check that it supports the stage.
    """
    spec = config.load(file, sets)
    check_local(spec, file.parent)
    kind = spec.model_dump()["kind"]
    if as_json:
        print_json({"file": str(file), "kind": kind, "digest": spec.digest(), "ok": True})
    else:
        echo(f"ok: {file} is a valid {kind} spec (digest {spec.digest()[:8]})")


@app.command()
def show(file: SpecFile, sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Print the resolved spec: each key with its value and its source (file or default)."""
    spec = config.load(file, sets)
    tree = config.read_yaml(file.read_text(encoding="utf-8"))
    given = {**tree, **{item.partition("=")[0]: True for item in sets}}
    rows = list(config.explain(spec, given))
    if as_json:
        print_json({key: {"value": value, "from": came} for key, value, came in rows})
    else:
        print_table(f"{file} (digest {spec.digest()[:8]})", ("key", "value", "from"), rows)


@app.command()
def schema(kind: Annotated[str, typer.Argument(metavar="KIND|FILE", help="Kind of a spec, or a spec file.")]) -> None:
    """Print the JSON schema of a spec, for editors."""
    if kind not in config.SPEC_KINDS and Path(kind).suffix in (".yaml", ".yml"):
        tree = yaml.safe_load(Path(kind).read_text(encoding="utf-8")) if Path(kind).is_file() else None
        if not isinstance(tree, dict):
            raise ConfigError(
                f"spec file {kind}", "it does not exist or is no mapping", "schema takes a stage or a spec file"
            )
        kind = str(tree.get("kind"))
    print_json(config.schema(kind))


k8s_app = typer.Typer(help="Render the Kubernetes objects of a job or endpoint.", no_args_is_help=True)
NOWHERE = "render"
"""Context of a target that is not opened."""


@k8s_app.callback()
def k8s() -> None:
    """Render the Kubernetes objects of a job or endpoint."""


@k8s_app.command()
def render(
    file: options.SpecFile,
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
    from graftwork.cluster.jobs.packaging import wheel_uri
    from graftwork.cluster.kuberay.objects import service_objects
    from graftwork.cluster.targets.kuberay import KubeRayTarget

    spec, cluster, target = config.load(file, sets), cluster_of(cluster_config), f"k8s:{NOWHERE}/{namespace}"
    machines = machines_of(cluster)
    spec, chosen = with_gpus(spec, machines.accelerators)
    job, _, _ = with_demand(job_of(spec, cluster, target), spec, file.parent, machines)
    if chosen is not None:
        note(f"note: {chosen}")
    if publish:
        _publish(job)
    objects: Sequence[Mapping[str, Any]]
    if job.kind == "serve":
        uri = wheel_uri(Store(job.root)) if cluster.code == "wheel" else None
        objects = service_objects(job, namespace, uri)
    else:
        objects = KubeRayTarget(target, job.root, cluster).objects(Attempt(job, attempt))
    sys.stdout.write(yaml.safe_dump_all([dict(one) for one in objects], sort_keys=False, width=120))


def _publish(job: Job) -> None:
    """Upload the code and the job's local rows to the store, from which the objects load them."""
    from graftwork.cluster.jobs.inputs import send
    from graftwork.cluster.jobs.packaging import publish_wheel

    store = Store(job.root)
    if job.cluster.code == "wheel":
        publish_wheel(store)
    for one in job.inputs:
        send(store, one)
