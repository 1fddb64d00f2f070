"""How a stage's command becomes a job: submitted or found, followed to its end, or left to run."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from graftwork.cli.job_render import left_behind, line_of, next_commands, root_flag
from graftwork.cli.options import Budget, ClusterConfig, Deadline, Detach, JsonFlag, QueueTimeout, Sets, Target
from graftwork.cli.render import duration, echo, gib, print_json, stderr
from graftwork.cluster.jobs.inputs import SentSpec, with_inputs
from graftwork.cluster.jobs.models import Demand, Finding, Job, JobBackend, JobStatus, TargetMachines
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.ray_address import JOB, unknown_place
from graftwork.cluster.session import terminated_as_interrupt
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import Spec, SpecT, load
from graftwork.errors import ClusterError, ConfigError, GraftworkError, Interrupted, UserError
from graftwork.planning.accelerators import accelerators_here, gpus_of, is_auto, with_gpus
from graftwork.storage.store import Store

if TYPE_CHECKING:
    from graftwork.planning.plan import StagePlan


# Demand of a job's workers: from its spec, and from the plan of its stage on the machines of its target.


UNPLANNED = frozenset({"exec", "experiment", "rag", "cluster"})


def planned(
    spec: Spec, folder: Path, machines: TargetMachines | None
) -> tuple["Sequence[StagePlan]", tuple[Finding, ...]]:
    """The stage's lines on the target's machines; a finding where nothing can be predicted.

    The data may lie where only the cluster sees it, and the GPU may be one that the table does not have.
    """
    kind = str(spec.model_dump(mode="json", include={"kind"})["kind"])
    if kind in UNPLANNED:
        return (), ()
    from graftwork.cli.stage_plans import plan_on

    try:
        machine = None if machines is None else machines.planned_for(gpus_of(spec))
        if machine is not None:
            return plan_on(spec, folder, machine), ()
        found = "the place does not answer" if machines is None else f"GPUs of type {_types(machines)}"
    except UserError as error:
        found = f"{error.subject}: {error.problem}" if error.problem else error.subject
    return (), (
        Finding(
            "W-NOT-PREDICTED",
            "warning",
            "demand",
            found,
            "memory and time are predicted where this machine reads the data and knows the GPU",
            "name gpu_type of the workers in the cluster's file; or plan where the data is seen",
        ),
    )


def demands_of(spec: Spec, lines: "Sequence[StagePlan]") -> list[Demand]:
    """Of each stage that needs more of one machine than a larger one, the largest first.

    A sweep's trials and replicas count as workers.
    """
    tree = spec.model_dump(mode="json")
    work = tree.get("train", tree) if tree["kind"] == "tune" else tree
    cpus = float(work.get("cpus_per_worker") or work.get("num_cpus") or 1.0)
    gpus, asked = gpus_of(spec), int(work.get("num_workers") or work.get("num_replicas") or 1)
    if not lines:
        return [Demand(asked, cpus, gpus)]
    seconds = None if tree["kind"] == "serve" else sum(line.seconds for line in lines)
    embedders = 1 if gpus and tree.get("embedder") else 0  # a process without a GPU
    found: list[Demand] = []
    for line in sorted(lines, key=lambda line: -line.peak_bytes_per_process * line.processes):
        host, of_gpu = (
            (line.host_bytes_per_process, line.peak_bytes_per_process) if gpus else (line.peak_bytes_per_process, 0)
        )
        if all(host > one.memory_bytes_per_worker or of_gpu > one.gpu_memory_bytes_per_worker for one in found):
            found.append(Demand(max(line.processes - embedders, 1), cpus, gpus, host, seconds, of_gpu))
    return found


def with_demand(
    job: Job, spec: Spec, folder: Path, machines: TargetMachines | None
) -> tuple[Job, "Sequence[StagePlan]", tuple[Finding, ...]]:
    """The job with what its workers take, the lines it comes from, and what could not be predicted.

    `spec` as it was given: its local rows are read here. None for `machines` of a place that does not answer.
    """
    lines, findings = planned(spec, folder, machines)
    first, *others = demands_of(spec, lines)
    return replace(job, demand=first, other_demands=tuple(others)), lines, findings


def _types(machines: TargetMachines) -> str:
    return ", ".join(name or "(none named)" for name in machines.gpu_types) or "(none)"


# A job followed to its end: what it prints, its retries and limits, and what Ctrl-C does.


POLL_INTERVAL_S = 0.5
PATIENCE_S = 300.0
"""How long a place that does not answer is asked again before the command gives up; the job goes on there."""


class _Waiting:
    """Run `JobBackend.wait` in a thread: it retries as the cluster says, and enforces the pending limit."""

    def __init__(self, backend: JobBackend, job_id: str) -> None:
        self._backend, self._job_id = backend, job_id
        self._status: JobStatus | None = None
        self._error: GraftworkError | None = None
        self._thread = threading.Thread(target=self._wait, name="job-wait", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def status(self, timeout_s: float) -> JobStatus | None:
        """Once it has ended. Raises what `wait` raised."""
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._status

    def _wait(self) -> None:
        try:
            self._status = _patiently(lambda: self._backend.wait(self._job_id), self._backend.on)
        except GraftworkError as error:
            self._error = error


def follow(backend: JobBackend, root: str, job_id: str, stream: TextIO, *, cancels: bool) -> JobStatus:
    """Print what the job prints, all attempts from the latest on, until it has ended.

    Ctrl-C (and SIGTERM) cancels the job where `cancels`, else only stops looking; raises Interrupted either way.
    """
    try:
        with terminated_as_interrupt():
            return _follow(backend, JobStore(root), job_id, stream)
    except KeyboardInterrupt:
        raise _interrupted(backend, root, job_id, cancels=cancels) from None


def _follow(backend: JobBackend, runs: JobStore, job_id: str, stream: TextIO) -> JobStatus:
    waiting = _Waiting(backend, job_id)
    first, shown = max(runs.attempts(job_id), default=1), dict[int, dict[str, int]]()
    while True:
        done = waiting.done
        for number in [n for n in runs.attempts(job_id) if n >= first]:
            for text in runs.logs(job_id, number, shown.setdefault(number, {})):
                stream.write(text)
                stream.flush()
        status = waiting.status(POLL_INTERVAL_S)
        if done and status is not None:
            return status


def _patiently(ask: Callable[[], JobStatus], on: str) -> JobStatus:
    """Ask again while the place is out of reach."""
    began: float | None = None
    while True:
        asked_at = time.monotonic()
        try:
            return ask()
        except ClusterError as error:
            now = time.monotonic()
            if began is None or now - asked_at > PATIENCE_S:  # it answered meanwhile
                began = now
                stderr.print(
                    f"{on} does not answer ({error.problem}); the job goes on there: asking again",
                    markup=False,
                    soft_wrap=True,
                )
            if now - began > PATIENCE_S:
                raise
            time.sleep(2 * POLL_INTERVAL_S)


def _interrupted(backend: JobBackend, root: str, job_id: str, *, cancels: bool) -> Interrupted:
    flag = root_flag(root)
    if not cancels:
        return Interrupted(
            f"job {job_id}",
            "it goes on: this command found it at work",
            "",
            f"graftwork jobs logs -f {job_id}{flag}; or: graftwork jobs cancel {job_id}",
        )
    stderr.print(
        f"Ctrl-C: cancelling {job_id} at {backend.on}; once more leaves that to you", markup=False, soft_wrap=True
    )
    try:
        status = backend.cancel(job_id)
    except (KeyboardInterrupt, ClusterError) as error:
        why = f" ({error.problem})" if isinstance(error, ClusterError) else ""
        return Interrupted(
            f"job {job_id}", f"it may still run at {backend.on}{why}", "", f"graftwork jobs cancel {job_id}{flag}"
        )
    return Interrupted(
        f"job {job_id}",
        f"{status.state} at {backend.on} by Ctrl-C",
        "what was committed stays valid; --detach leaves a job to run",
        "run the same command: it goes on from the last checkpoint",
    )


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
        flags = {
            "--cluster-config": self.cluster_config,
            "--deadline": self.deadline,
            "--budget": self.budget,
            "--queue-timeout": self.queue_timeout,
        }
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
                f"{', '.join(flags)} with --target {self.target}",
                "it would have no effect",
                "limits and prices are a job's, and this command runs the stage itself",
                "add --detach",
            )
        return self.detach

    def cluster_spec(self) -> ClusterSpec:
        """What the place is like, with the limits of the command line. Raises ConfigError."""
        given = {
            "limits.deadline": self.deadline,
            "limits.budget_usd": self.budget,
            "limits.pending": self.queue_timeout,
        }
        spec = cluster_of(self.cluster_config)
        if self.budget is not None and spec.prices is None:
            raise ConfigError(
                f"--budget {self.budget:g}",
                "the cluster's file has no prices",
                "a budget is held by a price table",
                "add prices: {gpu_hour: {H100: ...}}",
            )
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
    """A stage's spec as a job. For another place than this machine its local rows go along (cluster/jobs/inputs.py)."""
    root = root_of_job(spec, cluster)
    sent = SentSpec(spec, spec.identity(), ()) if on == "local" else with_inputs(spec, root)
    dump = {**sent.spec.model_dump(mode="json"), "root": root}
    return Job(
        str(dump.get("name") or dump["kind"]), str(dump["kind"]), sent.identity, root, dump, cluster, inputs=sent.inputs
    )


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
    from graftwork.cluster.targets import backend_of

    cluster = options.cluster_spec()
    backend = backend_of(options.target, root_of_job(spec, cluster), cluster)
    if is_auto(spec):
        spec, chosen = with_gpus(spec, backend.machines(cluster).accelerators)
        stderr.print(f"note: {chosen}", markup=False, soft_wrap=True)
    job = job_of(spec, cluster, options.target)
    if not JobStore(job.root).attempts(job.job_id):
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
