"""Jobs of stages: a spec as a job, the demand of its workers, and its plan on the job's target."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.cluster.jobs.backend import StoredBackend, usd_per_hour
from graftwork.cluster.jobs.inputs import SentSpec, with_inputs
from graftwork.cluster.jobs.models import Attempt, Demand, Finding, Job, JobBackend, JobPlan, TargetMachines
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import Spec
from graftwork.errors import ClusterError, UserError
from graftwork.planning.hardware import Accelerators, gpus_of, with_gpus
from graftwork.storage.store import Store

if TYPE_CHECKING:
    from graftwork.planning.memory import StagePlan

UNPLANNED = frozenset({"exec", "experiment", "rag", "cluster"})
"""Kinds without a prediction of memory and time."""


@dataclass(frozen=True)
class PlannedJob:
    """A job with its plan on a target and the predictions of its stages."""

    job: Job
    on: str
    lines: "Sequence[StagePlan]"
    plan: JobPlan
    unheard: ClusterError | None
    """Reason why the target could not be read. The plan then has what needs no target."""
    resolved: str | None = None
    """Number of GPUs that `auto` resolved to on the target, with the reason."""

    @property
    def refused(self) -> bool:
        """Return whether the target would reject the job."""
        return any(finding.level == "error" for finding in self.plan.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan, JSON-ready."""
        return {
            **asdict(self.plan),
            "on": self.on,
            "root": self.job.root,
            "demand": asdict(self.job.demand),
            "resolved": self.resolved,
            "inputs": [{**asdict(one), "path": str(one.path)} for one in self.job.inputs],
            "usd_per_hour": usd_per_hour(self.job.cluster),
            "stages": [line.as_dict() for line in self.lines],
            "unheard": None if self.unheard is None else self.unheard.text(),
        }


def root_of_job(spec: Spec, cluster: ClusterSpec) -> str:
    """Return the store of a stage's job: the cluster's, else the spec's own."""
    return Store(cluster.storage.uri or str(spec.model_dump(mode="json", include={"root"})["root"])).uri


def job_of(spec: Spec, cluster: ClusterSpec, on: str = "local") -> Job:
    """Return a stage's spec as a job. For a target other than this machine the job carries its local rows."""
    root = root_of_job(spec, cluster)
    sent = SentSpec(spec, spec.identity(), ()) if on == "local" else with_inputs(spec, root)
    dump = {**sent.spec.model_dump(mode="json"), "root": root}
    return Job(
        str(dump.get("name") or dump["kind"]), str(dump["kind"]), sent.identity, root, dump, cluster, inputs=sent.inputs
    )


def plan_job(spec: Spec, folder: Path, on: str, cluster: ClusterSpec) -> PlannedJob:
    """Plan the job of a spec on a target; `folder` is the spec file's. Writes nothing.

    Raises ConfigError and StorageError, never ClusterError.
    """
    from graftwork.cluster.targets import backend_of

    backend = backend_of(on, root_of_job(spec, cluster), cluster)
    machines, resolved, unheard = None, None, None
    try:
        machines = backend.machines(cluster)
        spec, resolved = with_gpus(spec, machines.accelerators)
    except ClusterError as error:
        unheard = error
    job, lines, notes = with_demand(job_of(spec, cluster, on), spec, folder, machines)
    try:
        plan = backend.plan(job) if unheard is None else _plan_unreachable(backend, job)
    except ClusterError as error:
        unheard = error
        plan = _plan_unreachable(backend, job)
    return PlannedJob(job, on, lines, replace(plan, findings=(*plan.findings, *notes)), unheard, resolved)


def with_demand(
    job: Job, spec: Spec, folder: Path, machines: TargetMachines | None
) -> tuple[Job, "Sequence[StagePlan]", tuple[Finding, ...]]:
    """Return the job with the demand of its workers, the predictions it comes from, and a finding for each missing one.

    `spec` is the spec as given: its local rows are read here. `machines` is None for a target that does not answer.
    """
    lines, findings = predict(spec, folder, machines)
    first, *others = demands_of(spec, lines)
    return replace(job, demand=first, other_demands=tuple(others)), lines, findings


def predict(
    spec: Spec, folder: Path, machines: TargetMachines | None
) -> tuple["Sequence[StagePlan]", tuple[Finding, ...]]:
    """Return the stage's predictions on the target's machines, or a finding with the reason why there are none.

    The rows may be readable on the cluster only, and the GPU may be missing in the table of GPUs.
    """
    kind = str(spec.model_dump(mode="json", include={"kind"})["kind"])
    if kind in UNPLANNED:
        return (), ()
    from graftwork.stages.plans import plan_on

    try:
        machine = None if machines is None else machines.planned_for(gpus_of(spec))
        if machines is not None and machine is not None:
            return plan_on(spec, folder, machine, on_cluster=machines.owner != Accelerators.owner), ()
        types = ", ".join(name or "(none named)" for name in machines.gpu_types) if machines is not None else ""
        found = "the place does not answer" if machines is None else f"GPUs of type {types or '(none)'}"
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
    """Return the demand of each stage that no larger demand covers, the largest first.

    A sweep's trials and an endpoint's replicas count as workers.
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


def _plan_unreachable(backend: JobBackend, job: Job) -> JobPlan:
    """Plan without the target: sums, prices, the objects, and the rules that need no cluster."""
    assert isinstance(backend, StoredBackend)
    plan = backend.plan(job, reachable=False)
    if not backend.on.startswith("k8s:"):
        return plan
    from graftwork.cluster.kuberay.client import KubeNamespace
    from graftwork.cluster.kuberay.preflight import preflight

    found = preflight(Attempt(job, plan.attempt), KubeNamespace.parse(backend.on).namespace, None, plan.objects)
    return replace(plan, findings=tuple(found))
