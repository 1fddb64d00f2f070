"""What a job's workers take: from its spec, and from the plan of its stage where one can be made here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.cluster.backend import Demand, Finding, Job
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import Spec
from graftwork.errors import ConfigError, UserError

if TYPE_CHECKING:
    from graftwork.plan import Gpu, StagePlan

UNPLANNED = frozenset({"command", "experiment", "rag", "cluster"})


def planned(spec: Spec, folder: Path, cluster: ClusterSpec) -> tuple["Sequence[StagePlan]", tuple[Finding, ...]]:
    """The stage's lines on the cluster's GPUs, else on CPUs like this machine's; a finding where there are none.

    The data may lie where only the cluster sees it: then nothing is predicted, and that is said.
    """
    kind = str(spec.model_dump(mode="json", include={"kind"})["kind"])
    if kind in UNPLANNED:
        return (), ()
    from graftwork.cli.planning import plan_spec

    try:
        return plan_spec(spec, folder, _gpu(spec, cluster)), ()
    except UserError as error:
        found = f"{error.asked}: {error.found}" if error.found else error.asked
        return (), (
            Finding("W-NOT-PREDICTED", "warning", "demand", found,
                    "memory and time are predicted where this machine reads the data and knows the GPU",
                    "name gpu_type of the workers in the cluster's file; or plan where the data is seen"),
        )  # fmt: skip


def demand_of(spec: Spec, lines: "Sequence[StagePlan]") -> Demand:
    """Of the largest stage; a sweep's trials and replicas count as workers."""
    tree = spec.model_dump(mode="json")
    work = tree.get("train", tree) if tree["kind"] == "tune" else tree
    cpus = float(work.get("cpus_per_worker") or work.get("num_cpus") or 1.0)
    gpus = float(work.get("gpus_per_worker") or work.get("num_gpus") or 0.0)
    asked = int(work.get("num_workers") or work.get("num_replicas") or 1)
    if not lines:
        return Demand(asked, cpus, gpus)
    largest = max(lines, key=lambda line: line.peak_bytes_per_process * line.processes)
    seconds = None if tree["kind"] == "serve" else sum(line.seconds for line in lines)
    memory = 0 if gpus else largest.peak_bytes_per_process  # of a GPU, which is no memory of its machine
    return Demand(max(largest.processes, 1), cpus, gpus, memory, seconds)


def with_demand(job: Job, spec: Spec, folder: Path) -> tuple[Job, "Sequence[StagePlan]", tuple[Finding, ...]]:
    """The job with what its workers take, the lines it comes from, and what could not be predicted."""
    lines, findings = planned(spec, folder, job.cluster)
    return replace(job, demand=demand_of(spec, lines)), lines, findings


def _gpu(spec: Spec, cluster: ClusterSpec) -> "Gpu | None":
    """The GPU of the first group that has any, where the spec asks for GPUs and the table knows it."""
    tree = spec.model_dump(mode="json")
    asks = tree.get("gpus_per_worker") or tree.get("num_gpus")
    name = next((group.gpu_type for group in cluster.workers if group.gpu and group.gpu_type), None)
    if not asks or name is None:
        return None
    from graftwork.plan.gpus import named_gpu

    try:
        return named_gpu(name.lower())
    except ConfigError:
        return None  # then the stage says which GPUs it knows
