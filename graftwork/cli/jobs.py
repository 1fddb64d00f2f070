"""`graftwork jobs ls|status|logs|wait|cancel|resubmit`, and how a stage's command becomes a job."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import JsonFlag, print_json, print_table, say
from graftwork.cluster.backend import Backend, Job, JobStatus
from graftwork.cluster.run_store import RunStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import Spec, load
from graftwork.storage import DEFAULT_ROOT, Store

app = typer.Typer(help="What runs elsewhere: see it, follow it, end it, start it again.", no_args_is_help=True)
Root = Annotated[str, typer.Option("--root", help="The store of the jobs: a folder or s3://.", envvar="GRAFTWORK_ROOT")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="<name>-<hash>, as `jobs ls` lists it.")]


def job_of(spec: Spec, cluster: ClusterSpec) -> Job:
    """A stage's spec as a job."""
    dump = spec.model_dump(mode="json")
    root = cluster.storage.uri or str(dump["root"])
    dump["root"] = Store(root).uri
    return Job(str(dump["name"]), str(dump["kind"]), spec.identity(), dump["root"], dump, cluster)


def is_job(on: str, *, detach: bool) -> bool:
    """Whether a command is run by a driver elsewhere: on a cluster, or in the background."""
    return detach or on.startswith(("http://", "https://", "k8s:"))


def launch(spec: Spec, on: str, cluster_file: Path | None, *, detach: bool) -> None:
    """Submit, and unless detached print what it prints to its end; leaves with its exit code."""
    from graftwork.cluster.places import backend_of

    cluster = cluster_of(cluster_file)
    job = job_of(spec, cluster)
    backend = backend_of(on, job.root, cluster)
    status = backend.submit(job)
    say(f"job {status.job_id} (attempt {status.attempt}) on {on}: {status.state}; {status.why}")
    if detach:
        return
    for text in backend.logs(job.job_id, follow=True):
        sys.stdout.write(text)
        sys.stdout.flush()
    _leave(backend.wait(job.job_id))


def cluster_of(file: Path | None) -> ClusterSpec:
    """From --cluster; else cluster.yaml of this folder; else the defaults."""
    found = file or (Path("cluster.yaml") if Path("cluster.yaml").is_file() else None)
    if found is None:
        return ClusterSpec()
    spec = load(found, expect="cluster")
    assert isinstance(spec, ClusterSpec)
    return spec


@app.command("ls")
def ls(root: Root = DEFAULT_ROOT, as_json: JsonFlag = False) -> None:
    """All jobs of a store, newest first."""
    runs = RunStore(root)
    places = {runs.job(job_id).on for job_id in runs.job_ids()}
    statuses = [status for on in sorted(places) for status in _backend(on, root).list()]
    if as_json:
        return print_json([asdict(status) for status in statuses])
    print_table("jobs", ("job", "attempt", "state", "where", "why"),
                [(s.job_id, s.attempt, s.state, s.on, s.why) for s in statuses])  # fmt: skip


@app.command()
def status(job: JobId, root: Root = DEFAULT_ROOT, as_json: JsonFlag = False) -> None:
    """Where a job is."""
    found = _of(job, root).status(job)
    print_json(asdict(found)) if as_json else say(f"{found.job_id} attempt {found.attempt}: {found.state}; {found.why}")


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until it has ended.")] = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """What a job printed."""
    for text in _of(job, root).logs(job, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


@app.command()
def wait(job: JobId, root: Root = DEFAULT_ROOT) -> None:
    """Until a job has ended; leaves with its exit code."""
    _leave(_of(job, root).wait(job))


@app.command()
def cancel(job: JobId, root: Root = DEFAULT_ROOT) -> None:
    """End a job: nothing of it is left afterwards."""
    say(f"{job}: {_of(job, root).cancel(job).state}")


@app.command()
def resubmit(job: JobId, root: Root = DEFAULT_ROOT) -> None:
    """Start the next attempt of a job that has ended."""
    found = _of(job, root).resubmit(job)
    say(f"{found.job_id} attempt {found.attempt}: {found.state}; {found.why}")


def _of(job: str, root: str) -> Backend:
    return _backend(RunStore(root).job(job).on, root)


def _backend(on: str, root: str) -> Backend:
    from graftwork.cluster.places import backend_of

    return backend_of(on, root)


def _leave(status: JobStatus) -> None:
    say(f"{status.job_id} attempt {status.attempt}: {status.state}; {status.why}")
    code = status.exit_code if status.exit_code is not None else int(status.state != "succeeded")
    if code:
        raise typer.Exit(code)
