"""`graftwork jobs ls|status|logs|wait|cancel|resubmit|export`, and `graftwork doctor --target TARGET`.

The jobs are read from their object store, so that every machine that reaches the store can manage them.
"""

import difflib
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, get_args

import typer

from graftwork.cli.options import ClusterConfig, JsonFlag, cluster_of
from graftwork.cli.render import (
    details,
    echo,
    is_away,
    line_of,
    note,
    print_error,
    print_json,
    show_details,
    show_findings,
    show_list,
    stderr,
)
from graftwork.cli.stages import leave
from graftwork.cluster.jobs.launch import follow, root_flag
from graftwork.cluster.jobs.models import DIGEST_CHARS, JobBackend, JobState, JobStatus
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.spec import ClusterSpec, seconds_of
from graftwork.errors import ClusterError, ConfigError
from graftwork.storage.store import DEFAULT_ROOT

app = typer.Typer(help="Manage background and remote jobs.", no_args_is_help=True)
Root = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="ROOT",
        show_default=False,
        help="Object store of the jobs. Default: GRAFTWORK_ROOT, `storage.uri` of cluster.yaml, or .graftwork.",
    ),
]
AT_ONCE = 16
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id, attempt id, unique prefix of an id, or job name.")]
_ATTEMPT = re.compile(r"^(?P<job>.+)-a(?P<number>[1-9][0-9]*)$")
_ID = re.compile(rf"^(?P<name>.+)-[0-9a-f]{{{DIGEST_CHARS}}}$")


@app.command("ls")
def ls(
    target: Annotated[
        str | None, typer.Option("--target", metavar="TARGET", help="List only jobs of this target.")
    ] = None,
    state: Annotated[
        list[str], typer.Option("--state", help="List only jobs in this state. Repeatable, or comma-separated.")
    ] = [],  # noqa: B006
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most jobs to list.")] = 50,
    root: Root = None,
    as_json: JsonFlag = False,
) -> None:
    """List the jobs of an object store, newest first."""
    wanted = {part for text in state for part in text.split(",") if part}
    if unknown := sorted(wanted - set(get_args(JobState))):
        raise ConfigError(f"--state {', '.join(unknown)}", "no such state", f"one of {', '.join(get_args(JobState))}")
    where = root_of(root)
    runs = JobStore(where)
    found = _statuses(_targets(runs) if target is None else [target.rstrip("/")], where)
    shown = [status for status in found if not wanted or status.state in wanted]
    if as_json:
        print_json([asdict(status) for status in shown[:limit]])
        return
    show_list(shown[:limit], runs.store.uri, len(shown))
    for away in sorted({status.on for status in found if is_away(status)}):
        _warn_unreachable(away)


@app.command()
def status(job: JobId, root: Root = None, as_json: JsonFlag = False) -> None:
    """Show one job: state and its reason, times, progress, cost and next steps."""
    where, job_id, _ = _named(job, root)
    found = _backend(JobStore(where), where, job_id).status(job_id)
    shown = details(JobStore(where), found, where)
    if as_json:
        print_json(shown)
        return
    show_details(shown, found)
    if is_away(found):
        _warn_unreachable(found.on)


@app.command()
def logs(
    job: JobId,
    follow_it: Annotated[bool, typer.Option("-f", "--follow", help="Stream the log until the job ends.")] = False,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, help="Attempt number. Default: the latest.")
    ] = None,
    tail: Annotated[int | None, typer.Option("--tail", min=0, metavar="N", help="Print only the last N lines.")] = None,
    root: Root = None,
) -> None:
    """Print the log of a job, even after its cluster is gone."""
    where, job_id, named = _named(job, root)
    runs, number = JobStore(where), attempt or named
    known = runs.attempts(job_id)
    if number is not None and number not in known:
        raise ConfigError(
            f"--attempt {number}",
            f"{job_id} has no such attempt",
            f"its attempts: {', '.join(map(str, known)) or 'none'}",
        )
    if tail is not None:
        lines = "".join(runs.logs(job_id, number or max(known))).splitlines(keepends=True) if known else []
        sys.stdout.write("".join(lines[max(len(lines) - tail, 0) :]))
        sys.stdout.flush()
        if not follow_it:
            return
    for text in _backend(runs, where, job_id).logs(job_id, follow=follow_it, attempt=number):
        sys.stdout.write(text)
        sys.stdout.flush()


@app.command()
def wait(
    job: JobId,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="Stop waiting after this time, e.g. 30m. The job continues."),
    ] = None,
    root: Root = None,
    as_json: JsonFlag = False,
) -> None:
    """Wait until a job ends, and exit with its exit code. Resubmits a lost job as `retry` of its config allows."""
    where, job_id, _ = _named(job, root)
    try:
        seconds = seconds_of(timeout)
    except ValueError as error:
        raise ConfigError(f"--timeout {timeout}", str(error)) from None
    leave(_backend(JobStore(where), where, job_id).wait(job_id, seconds), where, as_json)


@app.command()
def cancel(job: JobId, root: Root = None, as_json: JsonFlag = False) -> None:
    """Cancel a job and remove its processes or Kubernetes objects. Committed results stay."""
    where, job_id, _ = _named(job, root)
    backend = _backend(JobStore(where), where, job_id)
    try:
        found = backend.cancel(job_id)
    except ClusterError as error:
        raise ClusterError(
            f"cancel {job_id}",
            f"{error.subject}: {error.problem}",
            "its driver was asked to end by the store; its state there is unknown",
            f"when {backend.on} answers: graftwork jobs cancel {job_id}{root_flag(where)}",
        ) from error
    print_json(asdict(found)) if as_json else echo(line_of(found))


@app.command()
def resubmit(
    job: JobId,
    follow_it: Annotated[bool, typer.Option("-f", "--follow", help="Stream the log until the job ends.")] = False,
    root: Root = None,
    as_json: JsonFlag = False,
) -> None:
    """Start another attempt of an ended job. It resumes from the last checkpoint."""
    where, job_id, _ = _named(job, root)
    backend = _backend(JobStore(where), where, job_id)
    found = backend.resubmit(job_id)
    if follow_it:
        stream = sys.stderr if as_json else sys.stdout
        leave(follow(backend, where, job_id, stream, note, cancels=True), where, as_json)
        return
    print_json(asdict(found)) if as_json else echo(line_of(found))


@app.command()
def export(
    root: Annotated[
        str, typer.Option("--root", envvar="GRAFTWORK_ROOT", help="Object store of the jobs.")
    ] = DEFAULT_ROOT,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 9464,
) -> None:
    """Serve Prometheus metrics of all jobs of an object store at /metrics, until Ctrl-C."""
    from graftwork.cluster.jobs.exporter import export as answer

    echo(f"jobs of {root} at http://{host}:{port}/metrics  (Ctrl-C ends it)")
    try:
        answer(root, host, port)
    except OSError as error:
        raise ClusterError(
            f"--host {host} --port {port}",
            f"cannot listen there ({error.strerror})",
            "one process a port",
            "choose another --port",
        ) from None


def doctor(
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="TARGET",
            help="Target to diagnose: local, http(s)://HOST:PORT (Ray dashboard), or k8s:CONTEXT/NAMESPACE.",
        ),
    ] = "local",
    root: Root = None,
    cluster_config: ClusterConfig = None,
    as_json: JsonFlag = False,
) -> None:
    """Diagnose a target, its object store and the connection to it, and suggest fixes. Starts no job.

    Exit codes: 0 jobs can run; 1 a problem prevents jobs from running; 3 the target does not answer.
    """
    from graftwork.cluster.jobs.backend import StoredBackend, probe_store
    from graftwork.cluster.jobs.checks import surroundings, versions
    from graftwork.cluster.targets import backend_of

    spec = cluster_of(cluster_config)
    where = root or spec.storage.uri or root_of(None)
    backend = backend_of(target, where, spec)
    assert isinstance(backend, StoredBackend)
    findings, unheard = [*surroundings(target, where, spec), *probe_store(where)], None
    try:
        findings += backend.place.doctor()
    except ClusterError as error:
        unheard = error
    here = versions()
    if as_json:
        print_json(
            {
                "on": target,
                "root": where,
                "versions": here,
                "findings": [asdict(one) for one in findings],
                "unheard": None if unheard is None else unheard.text(),
            }
        )
    else:
        echo(f"{target}, jobs in {where}")
        echo("  here: " + ", ".join(f"{name} {version}" for name, version in here.items()))
        show_findings(findings, "nothing is wrong" if unheard is None else "nothing else is wrong")
    if unheard is not None:
        print_error(unheard, as_json)
        raise typer.Exit(unheard.exit_code)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def root_of(given: str | None) -> str:
    """Return the store: `given`, GRAFTWORK_ROOT, that of cluster.yaml, or the default."""
    return given or os.environ.get("GRAFTWORK_ROOT") or cluster_of(None).storage.uri or DEFAULT_ROOT


def job_called(runs: JobStore, said: str) -> tuple[str, int | None]:
    """Return the job's id, and the attempt where `said` names one. A bare name is its latest job.

    Raises ConfigError for none (naming the nearest) and for several.
    """
    ids = runs.job_ids()
    attempt = _ATTEMPT.match(said)
    if attempt and (whole := _complete_id(runs, attempt["job"], ids)) is not None:
        number, attempts = int(attempt["number"]), runs.attempts(whole)
        if number not in attempts:
            known = ", ".join(map(str, attempts)) or "none"
            raise ConfigError(f"JOB {whole}-a{number}", f"it has no attempt {number}", f"its attempts: {known}")
        return whole, number
    if (whole := _complete_id(runs, said, ids)) is not None:
        return whole, None
    begun = [job_id for job_id in ids if said and job_id.startswith(said)]
    if len(begun) == 1:
        return begun[0], None
    if begun:
        rule = "JOB is an id, an attempt's, a beginning that is one job's alone, or a whole name"
        raise ConfigError(
            f"JOB {said}", f"{len(begun)} jobs begin so: {', '.join(begun[:5])}", rule, "write more of it"
        )
    raise _unknown_job(runs, said, ids)


def _complete_id(runs: JobStore, said: str, ids: list[str]) -> str | None:
    """Return the id of a whole id or a bare name."""
    named = [said] if said in ids else [job_id for job_id in ids if _name(job_id) == said]
    return max(named, key=lambda job_id: runs.job(job_id).created_at) if named else None


def _name(job_id: str) -> str:
    found = _ID.match(job_id)
    return found["name"] if found else job_id


def _unknown_job(runs: JobStore, said: str, ids: list[str]) -> ConfigError:
    near = difflib.get_close_matches(said, [*ids, *{_name(job_id) for job_id in ids}], n=1, cutoff=0.5)
    holds = f"the store {runs.store.uri} has " + (f"{len(ids)} jobs and none of that name" if ids else "no jobs")
    return ConfigError(
        f"JOB {said}",
        f"{holds}; did you mean {near[0]!r}?" if near else holds,
        "--root (or GRAFTWORK_ROOT, or storage.uri in cluster.yaml) is the store that the job was submitted to",
        "graftwork jobs ls, there",
    )


def _warn_unreachable(on: str) -> None:
    stderr.print(
        f"{on} does not answer; its jobs are shown as recorded in the store",
        style="yellow",
        markup=False,
        soft_wrap=True,
    )


def _named(job: str, root: str | None) -> tuple[str, str, int | None]:
    where = root_of(root)
    return where, *job_called(JobStore(where), job)


def _statuses(targets: Sequence[str], root: str) -> list[JobStatus]:
    """Return all jobs, newest first; the targets are read at the same time."""
    from graftwork.cluster.targets import backend_of

    with ThreadPoolExecutor(max_workers=max(len(targets), 1)) as pool:
        found = [status for jobs in pool.map(lambda on: backend_of(on, root, None).list(), targets) for status in jobs]
    return sorted(found, key=lambda status: -(status.submitted_at or time.time()))


def _targets(runs: JobStore) -> list[str]:
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return sorted({record.on for record in pool.map(runs.job, runs.job_ids())})


def _backend(runs: JobStore, root: str, job_id: str) -> JobBackend:
    from graftwork.cluster.targets import backend_of

    record = runs.job(job_id)
    return backend_of(record.on, root, ClusterSpec.model_validate(record.cluster))
