"""How a stage's command becomes a job: submitted or found, followed to its end, or left to run."""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import typer

from graftwork.accelerators import accelerators_here, is_auto, with_gpus
from graftwork.cli.following import follow
from graftwork.cli.job_words import left_behind, line_of, next_commands, root_flag
from graftwork.cli.options import Budget, ClusterConfig, Deadline, Detach, JsonFlag, QueueTimeout, Sets, Target
from graftwork.cli.output import duration, echo, gib, print_json, stderr
from graftwork.cluster.address import JOB, unknown_place
from graftwork.cluster.backend import Job, JobBackend, JobStatus
from graftwork.cluster.inputs import SentSpec, with_inputs
from graftwork.cluster.run_store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import Spec, SpecT, load
from graftwork.errors import ConfigError
from graftwork.storage import Store

CLUSTER_FILE = "cluster.yaml"
ELSEWHERE = ("http:", "https:", "k8s:")


@dataclass(frozen=True)
class StageOptions:
    """Options of `plan` and of every stage command."""

    sets: Sets = field(default_factory=list)
    cluster_config: ClusterConfig = None
    deadline: Deadline = None
    budget: Budget = None
    queue_timeout: QueueTimeout = None
    as_json: JsonFlag = False

    def job_flags(self) -> list[str]:
        """Return the given flags that apply to jobs only."""
        flags = {"--cluster-config": self.cluster_config, "--deadline": self.deadline, "--budget": self.budget,
                 "--queue-timeout": self.queue_timeout}  # fmt: skip
        return [flag for flag, value in flags.items() if value is not None]


@dataclass(frozen=True)
class LaunchOptions(StageOptions):
    """Options of every stage command: a field added here or to StageOptions is an option of all of them."""

    target: Target = "local"
    detach: Detach = False

    @property
    def elsewhere(self) -> bool:
        """Whether a driver runs it: on a cluster, or in the background. Raises ConfigError for flags without effect."""
        if self.target.startswith(ELSEWHERE):
            return True
        if self.target not in ("local", JOB):
            raise unknown_place(self.target)
        if (flags := self.job_flags()) and not self.detach:
            raise ConfigError(
                f"{', '.join(flags)} with --target {self.target}", "it would have no effect",
                "limits and prices are a job's, and this command runs the stage itself", "add --detach",
            )  # fmt: skip
        return self.detach

    def cluster_spec(self) -> ClusterSpec:
        """What the place is like, with the limits of the command line. Raises ConfigError."""
        given = {
            "limits.deadline": self.deadline, "limits.budget_usd": self.budget, "limits.pending": self.queue_timeout,
        }  # fmt: skip
        spec = cluster_of(self.cluster_config)
        if self.budget is not None and spec.prices is None:
            raise ConfigError(f"--budget {self.budget:g}", "the cluster's file has no prices",
                              "a budget is held by a price table", "add prices: {gpu_hour: {H100: ...}}")  # fmt: skip
        return spec.with_({key: value for key, value in given.items() if value is not None})


def cluster_of(file: Path | None) -> ClusterSpec:
    """From --cluster-config; else cluster.yaml of this folder; else the defaults."""
    found = file or (Path(CLUSTER_FILE) if Path(CLUSTER_FILE).is_file() else None)
    if found is None:
        return ClusterSpec()
    spec = load(found, expect="cluster")
    assert isinstance(spec, ClusterSpec)
    return spec


def root_of_job(spec: Spec, cluster: ClusterSpec) -> str:
    """The store of a stage's job: the cluster's, else the spec's own."""
    return Store(cluster.storage.uri or str(spec.model_dump(mode="json", include={"root"})["root"])).uri


def job_of(spec: Spec, cluster: ClusterSpec, on: str = "local") -> Job:
    """A stage's spec as a job. For another place than this machine its local rows go along (cluster/inputs.py)."""
    root = root_of_job(spec, cluster)
    sent = SentSpec(spec, spec.identity(), ()) if on == "local" else with_inputs(spec, root)
    dump = {**sent.spec.model_dump(mode="json"), "root": root}
    return Job(str(dump.get("name") or dump["kind"]), str(dump["kind"]), sent.identity, root, dump, cluster,
               inputs=sent.inputs)  # fmt: skip


def resolve_here(spec: SpecT, on: str, quiet: bool) -> SpecT:
    """Resolve `auto` GPUs for a stage that this command runs on this machine, and print the number with its reason.

    In a job, `auto` is resolved before the job is named.
    """
    if on != "local":
        return spec
    resolved, note = with_gpus(spec, accelerators_here())
    if note is not None and not quiet:
        echo(f"note: {note}")
    return resolved


def launch(spec: Spec, file: Path, options: LaunchOptions) -> None:
    """Submit, and unless detached print what it prints to its end; leaves with its exit code."""
    from graftwork.cluster.places import backend_of

    cluster = options.cluster_spec()
    backend = backend_of(options.target, root_of_job(spec, cluster), cluster)
    if is_auto(spec):
        spec, chosen = with_gpus(spec, backend.machines(cluster).accelerators)
        stderr.print(f"note: {chosen}", markup=False, soft_wrap=True)
    job = job_of(spec, cluster, options.target)
    if not JobStore(job.root).attempts(job.job_id):
        from graftwork.cli.demands import with_demand

        for one in job.inputs:
            copied = f"note: {one.path} ({gib(one.bytes)}) is copied to the store as {'/'.join(one.key)}"
            stderr.print(copied, markup=False, soft_wrap=True)
        job, _, notes = with_demand(job, spec, file.parent, backend.machines(cluster))
        for note in notes:
            stderr.print(f"note: {note.code} {note.problem}", markup=False, soft_wrap=True)
    ours, status = started(backend, job, options.target)
    if options.detach:
        if options.as_json:
            return print_json({**asdict(status), "root": job.root})
        flag = root_flag(job.root)
        if not status.ended:
            echo(f"  follow it: graftwork jobs logs -f {job.job_id}{flag}")
            echo(f"  end it: graftwork jobs cancel {job.job_id}{flag}")
        return
    if not status.ended:
        stream = sys.stderr if options.as_json else sys.stdout
        status = follow(backend, job.root, job.job_id, stream, cancels=ours)
    leave(status, job.root, options.as_json)


def started(backend: JobBackend, job: Job, on: str) -> tuple[bool, JobStatus]:
    """Submit it, find it at work, or start its next attempt where the last one ended without success.

    First whether an attempt began here: Ctrl-C ends what this command began, and no more.
    """
    runs = JobStore(job.root)
    before = runs.attempts(job.job_id)
    status = backend.submit(job)
    if not before:
        stderr.print(f"job {line_of(status)}", markup=False, soft_wrap=True)
        return True, status
    if not status.ended:
        _say_limits(runs, job)
        stderr.print(f"job {line_of(status)} (found; started before)", markup=False, soft_wrap=True)
        return False, status
    if status.state == "succeeded":
        stderr.print(f"job {line_of(status)}: nothing to start", markup=False, soft_wrap=True)
        return False, status
    runs.amend(replace(runs.job(job.job_id), cluster=job.cluster.model_dump(mode="json")))
    again = backend.resubmit(job.job_id)
    said = f"attempt {status.attempt} ended {status.state} ({status.why}); it goes on as attempt {again.attempt}"
    stderr.print(f"job {job.job_id} on {on}: {said}", markup=False, soft_wrap=True)
    return True, again


def leave(status: JobStatus, root: str, as_json: bool = False) -> None:
    """Say how a job ended and what it left; exits with the code of its command, 1 where it has none."""
    left = left_behind(JobStore(root), status)
    if as_json:
        print_json({**asdict(status), "root": root, "left": left})
    else:
        took = duration(status.ended_at - status.started_at) if status.ended_at and status.started_at else None
        echo(f"job {line_of(status)}" + (f", after {took}" if took else ""))
        if status.state == "succeeded":
            for line in left:
                echo(f"  {line}")
        elif status.ended:
            for move in next_commands(status, root):
                echo(f"  next: {move}")
    code = status.exit_code if status.exit_code is not None else int(status.state != "succeeded")
    if code:
        raise typer.Exit(code if code > 0 else 1)


def _say_limits(runs: JobStore, job: Job) -> None:
    kept = ClusterSpec.model_validate(runs.job(job.job_id).cluster)
    if kept.limits != job.cluster.limits:
        said = "it runs with the limits that it was submitted with; cancel it and run this again to change them"
        stderr.print(f"note: {said}", markup=False, soft_wrap=True)
