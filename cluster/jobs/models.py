"""Jobs: their data, and the protocols of a backend (plan, submit, status, logs, cancel, list, wait) and of a target.

A job is a stage's resolved spec, run by `graftwork.cluster.jobs.driver` where the work is. Its record is in the run
store (`cluster/jobs/store.py`) and outlives the cluster; a place is asked only for what it alone knows.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from graftwork.cluster.spec import ClusterSpec
from graftwork.config import Spec
from graftwork.planning.hardware import Accelerators, Gpu, Machine, gpu_called
from graftwork.storage.store import DEFAULT_ROOT, NAME_PATTERN

# Program of the user as a job, to prepare data, to evaluate or to convert.


class ExecSpec(Spec):
    """Runs `argv` where the work is, with a job's log, limits and fence. Its environment names the job (fencing.py)."""

    kind: Literal["exec"] = "exec"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    argv: tuple[str, ...] = Field(min_length=1)
    """Program and arguments, one string each. No shell reads them."""


# Machines of a target: what `auto` GPUs and a stage's plan are resolved against before a job is submitted.


@dataclass(frozen=True)
class TargetMachines:
    """CPUs, memory and GPUs that workers of a job may get in a place, summed over its machines."""

    owner: str
    """Subject of `... has GPUs`: this machine, an address, `cluster group h100`."""
    cpus: float
    memory_bytes: int
    gpus: float = 0.0
    gpu_types: tuple[str, ...] = ()
    """GPU types as the place names them; empty for one without a name there."""
    gpu_memory_bytes: int = 0
    """Memory of the smallest GPU, where the driver reports it; else the table's figure of its type counts."""

    @property
    def accelerators(self) -> Accelerators:
        """Their GPUs."""
        return Accelerators(self.gpus, self.gpu_types, self.owner)

    @property
    def smallest_gpu(self) -> Gpu | None:
        """The GPU with the least memory, since a worker may be placed on any; None where one type is not known."""
        known = [gpu_called(name) for name in self.gpu_types]
        found = [gpu for gpu in known if gpu is not None]
        if not found or len(found) < len(known):
            return None
        least = min(found, key=lambda gpu: gpu.memory_gib)
        if not self.gpu_memory_bytes:
            return least
        return least.model_copy(update={"memory_gib": self.gpu_memory_bytes / 2**30})

    def planned_for(self, gpus_per_worker: float) -> Machine | None:
        """The machine that a stage's plan is made for; None where a GPU is wanted whose figures are not known."""
        if gpus_per_worker:
            gpu = self.smallest_gpu
            return None if gpu is None else Machine.with_gpus(gpu)
        return replace(Machine.detect(), cores=max(int(self.cpus), 1), memory_bytes=self.memory_bytes)


JobState = Literal[
    "submitted", "queued", "pending", "running", "suspended", "succeeded", "failed", "stopped", "cancelled", "lost"
]
"""submitted: recorded, and its place has not shown it yet. queued: a queue holds it back. pending: machines or driver
come up. stopped: by a limit of its own. cancelled: by a person. lost: its driver was heard and is silent now, or its
place no longer knows it."""
ENDED: frozenset[JobState] = frozenset({"succeeded", "failed", "stopped", "cancelled", "lost"})
Level = Literal["error", "warning"]
DIGEST_CHARS = 10


@dataclass(frozen=True)
class Demand:
    """What the workers of a job take, as Ray places them; from the stage's plan."""

    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    memory_bytes_per_worker: int = 0
    """Predicted peak in the machine's own memory; 0 where it was not predicted."""
    seconds: float | None = None
    """Predicted time; None where it was not predicted."""
    gpu_memory_bytes_per_worker: int = 0
    """Predicted peak in a GPU's memory; 0 where no GPU is used or it was not predicted."""


@dataclass(frozen=True)
class JobInput:
    """A file or folder of this machine that goes to the job's store before the job starts (cluster/jobs/inputs.py)."""

    path: Path
    key: tuple[str, ...]
    """In the store, named by the content."""
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Job:
    """A stage to run elsewhere. `digest` is `Spec.identity()`: two stores, one job."""

    name: str
    kind: str
    """The graftwork command that runs it: train, tune, compare, serve, quantize."""
    digest: str
    root: str
    """Where its run store is: a folder that the place reaches too, or s3://."""
    spec: Mapping[str, Any]
    """The stage's whole spec, resolved, as JSON."""
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    demand: Demand = field(default_factory=Demand)
    """The stage with the most memory in all."""
    other_demands: tuple[Demand, ...] = ()
    """Stages that run before or after `demand`'s: a sweep's winner, another precision."""
    inputs: tuple[JobInput, ...] = ()
    """Local files that `spec` names by their copies in the store; sent by `submit`, once preflight has passed."""

    @property
    def demands(self) -> tuple[Demand, ...]:
        """Of all stages. Each has to fit by itself."""
        return (self.demand, *self.other_demands)

    @property
    def job_id(self) -> str:
        """`<name>-<first 10 of the digest>`."""
        return f"{self.name}-{self.digest[:DIGEST_CHARS]}"


@dataclass(frozen=True)
class Attempt:
    """One try at a job. `id` names it in its place too, so that starting it twice starts it once."""

    job: Job
    number: int

    @property
    def id(self) -> str:
        """`<job_id>-a<number>`."""
        return attempt_id(self.job.job_id, self.number)


@dataclass(frozen=True)
class Finding:
    """Something that preflight or doctor has seen. An error refuses the job before anything is written."""

    code: str
    """E or W and a name, e.g. `E-TTL-NEEDS-SHUTDOWN`; stable, for scripts."""
    level: Level
    where: str
    """Key of the spec, or path in an object."""
    problem: str
    rule: str = ""
    hint: str = ""


Findings = Iterator[Finding]


def refuse(code: str, where: str, problem: str, rule: str, hint: str) -> Finding:
    """Return an error, which keeps the job from being submitted. `code` without its `E-`."""
    return Finding(f"E-{code}", "error", where, problem, rule, hint)


def warn(code: str, where: str, problem: str, rule: str, hint: str) -> Finding:
    """Return a warning, with which the job goes on. `code` without its `W-`."""
    return Finding(f"W-{code}", "warning", where, problem, rule, hint)


@dataclass(frozen=True)
class JobPlan:
    """What a job will take in its place, before it is submitted."""

    job_id: str
    attempt: int
    """That `submit` would start or find."""
    exists: bool
    """Whether that attempt is there already."""
    cpus: float
    gpus: float
    memory_bytes: float
    gpu_hours: float | None
    """Predicted; None where the time is not predicted."""
    usd: float | None
    """Predicted, by the price table; None without one or without a predicted time."""
    most_usd: float | None
    """What it may cost at most: by deadline or budget."""
    objects: tuple[Mapping[str, Any], ...]
    """What would be made, KubeRay only."""
    diff: str
    """Unified diff of those objects against what is there; empty where nothing would change."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class JobStatus:
    """Where a job is, as its latest attempt shows it."""

    job_id: str
    attempt: int
    state: JobState
    why: str = ""
    """For people: what the state was judged by."""
    exit_code: int | None = None
    """Of the command, once it has ended by itself."""
    kind: str = ""
    on: str = ""
    submitted_at: float | None = None
    """Seconds since the epoch, as the other times."""
    started_at: float | None = None
    ended_at: float | None = None
    heartbeat_at: float | None = None
    progress: str = ""
    """The last thing its driver said of itself, e.g. `train mine: 40 of 120, loss 1.21`."""
    cause: Literal["", "lost", "preempted", "oom", "failed"] = ""
    """What a retry would be for, as `retry.on` names it."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class JobBackend(Protocol):
    """Runs jobs in one place. Every verb raises ClusterError when the place is out of reach or refuses us."""

    on: str

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """The machines that workers of a job may get here."""

    def plan(self, job: Job) -> JobPlan:
        """What `submit` would do. Writes nothing."""

    def submit(self, job: Job) -> JobStatus:
        """Start the job, or find it: the same job again, from anywhere and at any time, is one attempt.

        Raises PreflightError with all findings before anything is written.
        """

    def resubmit(self, job_id: str) -> JobStatus:
        """Start the next attempt of a job that has ended; it goes on from the last checkpoint. ConfigError else."""

    def status(self, job_id: str) -> JobStatus:
        """Where it is now. Works when the cluster is gone. ConfigError for one that was never submitted."""

    def logs(self, job_id: str, *, follow: bool = False, attempt: int | None = None) -> Iterator[str]:
        """What it printed, piece by piece; with `follow` until it has ended. Works when the cluster is gone."""

    def cancel(self, job_id: str) -> JobStatus:
        """End it; at return nothing of it is left in its place, a pending one included. No-op when it has ended."""

    def list(self) -> Sequence[JobStatus]:
        """All jobs of the store that this place runs or ran, newest first."""

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobStatus:
        """Until it has ended, retrying as `cluster.retry` says. RunError at the timeout; the job goes on."""


def attempt_id(job_id: str, number: int) -> str:
    """Name of an attempt, in the run store and in its place."""
    return f"{job_id}-a{number}"


# Target: attempts that are there, their start and their removal.
#
# `StoredBackend` (cluster/jobs/backend.py) makes a whole `JobBackend` of it: submission, fencing, status, logs:
# written once.


@dataclass(frozen=True)
class ObservedState:
    """An attempt as its place shows it, in KubeRay's words (RayJob's status); other places use `job_status` alone."""

    job_status: str = ""
    """Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED; empty before Ray has it."""
    deployment_status: str = ""
    """KubeRay's: Initializing, Running, Complete, Failed, ValidationFailed, Suspending, Suspended, Retrying or
    Waiting."""
    reason: str = ""
    """KubeRay's, e.g. DeadlineExceeded, AppFailed."""
    message: str = ""


class JobTarget(Protocol):
    """Each call raises ClusterError when the place is out of reach or refuses us, within some 10 s."""

    on: str

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """The machines that workers of a job may get here; `cluster` describes those that are made for a job."""

    def check(self, job: Job) -> list[Finding]:
        """What would keep the job from running here. Writes nothing that stays."""

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """The objects that `start` would make; empty where a place has none."""

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Those of them that are there, without what the server adds; for the diff."""

    def start(self, attempt: Attempt) -> None:
        """Have the attempt's driver run here: get-or-create by `attempt.id`, at any number of callers at once."""

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """What it shows of them, those it does not know left out. One round trip for all, however many."""

    def stop(self, attempt_id: str) -> None:
        """Nothing of it is left at return; no-op where it is not there. The driver was asked to end before."""

    def doctor(self) -> list[Finding]:
        """Return problems of the target itself, whatever the job; each finding has a fix. Writes nothing."""
