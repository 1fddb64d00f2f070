"""Demand of a job's workers: from its spec, and from the plan of its stage on the machines of its target."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.accelerators import gpus_of
from graftwork.cluster.backend import Demand, Finding, Job
from graftwork.cluster.target_machines import TargetMachines
from graftwork.config import Spec
from graftwork.errors import UserError

if TYPE_CHECKING:
    from graftwork.plan import StagePlan

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
    from graftwork.cli.planning import plan_on

    try:
        machine = None if machines is None else machines.planned_for(gpus_of(spec))
        if machine is not None:
            return plan_on(spec, folder, machine), ()
        found = "the place does not answer" if machines is None else f"GPUs of type {_types(machines)}"
    except UserError as error:
        found = f"{error.subject}: {error.problem}" if error.problem else error.subject
    return (), (
        Finding("W-NOT-PREDICTED", "warning", "demand", found,
                "memory and time are predicted where this machine reads the data and knows the GPU",
                "name gpu_type of the workers in the cluster's file; or plan where the data is seen"),
    )  # fmt: skip


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
        host, of_gpu = (line.host_bytes_per_process, line.peak_bytes_per_process) if gpus else (
            line.peak_bytes_per_process, 0)  # fmt: skip
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
