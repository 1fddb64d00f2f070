"""`graftwork plan FILE --target TARGET`: resources, price, objects and preflight findings of a job."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.accelerators import with_gpus
from graftwork.cli.demands import with_demand
from graftwork.cli.findings import show_findings
from graftwork.cli.launching import LaunchOptions, job_of, root_of_job
from graftwork.cli.output import duration, echo, gib
from graftwork.cluster.backend import Attempt, Job, JobBackend, JobPlan
from graftwork.cluster.cost import usd_per_hour
from graftwork.cluster.spec import quantity
from graftwork.config import Spec
from graftwork.errors import ClusterError

if TYPE_CHECKING:
    from graftwork.plan import StagePlan


@dataclass(frozen=True)
class WholePlan:
    """A job's plan with its stage's. `unheard`: why the place could not be asked; what needs no place is there."""

    job: Job
    on: str
    lines: "Sequence[StagePlan]"
    plan: JobPlan
    unheard: ClusterError | None
    resolved: str | None = None
    """The number of GPUs that `auto` resolved to there, with the reason."""

    @property
    def refused(self) -> bool:
        return any(finding.level == "error" for finding in self.plan.findings)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **asdict(self.plan), "on": self.on, "root": self.job.root, "demand": asdict(self.job.demand),
            "resolved": self.resolved, "inputs": [{**asdict(one), "path": str(one.path)} for one in self.job.inputs],
            "usd_per_hour": usd_per_hour(self.job.cluster), "stages": [line.as_dict() for line in self.lines],
            "unheard": None if self.unheard is None else self.unheard.text(),
        }  # fmt: skip


def plan_job(spec: Spec, folder: Path, options: LaunchOptions) -> WholePlan:
    """Writes nothing. Raises ConfigError, StorageError; never ClusterError."""
    from graftwork.cluster.places import backend_of

    cluster = options.cluster_spec()
    backend = backend_of(options.target, root_of_job(spec, cluster), cluster)
    machines, chosen, unheard = None, None, None
    try:
        machines = backend.machines(cluster)
        spec, chosen = with_gpus(spec, machines.accelerators)
    except ClusterError as error:
        unheard = error
    job, lines, notes = with_demand(job_of(spec, cluster, options.target), spec, folder, machines)
    try:
        plan = backend.plan(job) if unheard is None else _offline(backend, job, unheard)
    except ClusterError as error:
        unheard = error
        plan = _offline(backend, job, error)
    return WholePlan(job, options.target, lines, replace(plan, findings=(*plan.findings, *notes)), unheard, chosen)


def _offline(backend: JobBackend, job: Job, error: ClusterError) -> JobPlan:
    """What is known without the place: sums, prices, the objects against nothing, the rules that need no cluster."""
    from graftwork.cluster.places.unheard import UnheardPlace
    from graftwork.cluster.stored import StoredBackend

    assert isinstance(backend, StoredBackend)
    plan = StoredBackend(UnheardPlace(backend.on, error, backend.place), job.root).plan(job)
    if not backend.on.startswith("k8s:"):
        return plan
    from graftwork.cluster.kuberay.api import KubeNamespace
    from graftwork.cluster.kuberay.preflight import preflight

    found = preflight(Attempt(job, plan.attempt), KubeNamespace.parse(backend.on).namespace, None, plan.objects)
    return replace(plan, findings=tuple(found))


def show_job_plan(whole: WholePlan) -> None:
    """For people, below the table of stages."""
    job, plan, cluster = whole.job, whole.plan, whole.job.cluster
    there = "is there already: submitting finds it" if plan.exists else "new"
    facts = {
        "job": f"{plan.job_id} attempt {plan.attempt} on {whole.on} ({there})",
        "store": job.root,
        "workers": _workers(job),
        "resolved": whole.resolved,
        "sends": ", ".join(f"{one.path.name} ({gib(one.bytes)})" for one in job.inputs) or None,
        "machines": _machines(job) if whole.on.startswith("k8s:") else None,
        "time": None if job.demand.seconds is None else f"{duration(job.demand.seconds)} predicted" + (
            f", {plan.gpu_hours:.2f} GPU-hours" if plan.gpu_hours else ""),
        "price": _price(whole),
        "limits": f"pending {duration(cluster.limits.pending)}, deadline "
        + ("none" if cluster.limits.deadline is None else duration(cluster.limits.deadline)),
        "objects": ", ".join(f"{o['kind']} {o['metadata']['name']}" for o in plan.objects) or None,
    }  # fmt: skip
    for name, value in facts.items():
        if value is not None:
            echo(f"  {name:9s} {value}")
    if plan.objects:
        echo(plan.diff or "  nothing would change")
    show_findings(plan.findings)


def _workers(job: Job) -> str:
    demand = job.demand
    each = [f"{demand.cpus_per_worker:g} CPU"]
    of_gpu = f" ({gib(demand.gpu_memory_bytes_per_worker)} of it)" if demand.gpu_memory_bytes_per_worker else ""
    each += [f"{demand.gpus_per_worker:g} GPU{of_gpu}"] if demand.gpus_per_worker else []
    each += [gib(demand.memory_bytes_per_worker)] if demand.memory_bytes_per_worker else []
    return f"{demand.num_workers} x ({', '.join(each)})"


def _machines(job: Job) -> str:
    head = f"head {job.cluster.head.cpu} CPU {job.cluster.head.memory}"
    groups = [
        f"{group.name} {group.count} x ({group.cpu} CPU, {group.memory}"
        + (f", {group.gpu} {group.gpu_type or 'GPU'}" if group.gpu else "")
        + (", spot)" if group.spot else ")")
        for group in job.cluster.workers
    ]
    cpus = quantity(job.cluster.head.cpu) + sum(quantity(g.cpu) * g.count for g in job.cluster.workers)
    gpus = sum(g.gpu * g.count for g in job.cluster.workers)
    return f"{'; '.join([head, *groups])}: {cpus:g} CPU, {gpus} GPU in all"


def _price(whole: WholePlan) -> str:
    plan, cluster = whole.plan, whole.job.cluster
    hour = usd_per_hour(cluster)
    if hour is None:
        lacks = "no prices" if cluster.prices is None else "no price of a GPU type"
        return f"not known: the cluster's file has {lacks}"
    predicted = "not predicted" if plan.usd is None else f"${plan.usd:.2f} predicted"
    most = "no limit of it" if plan.most_usd is None else f"at most ${plan.most_usd:.2f}"
    by = ""
    if plan.most_usd is not None:
        by = " (budget)" if plan.most_usd == cluster.limits.budget_usd else " (deadline)"
    return f"{predicted}; {most}{by}; ${hour:.2f} an hour"
