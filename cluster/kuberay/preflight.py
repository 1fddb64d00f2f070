"""Preflight of a job for Kubernetes from its own and its cluster's spec: room, limits, names, references, store."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftwork.cluster.jobs.backend import predicted_usd, unpriced, usd_per_hour
from graftwork.cluster.jobs.demand_check import gpu_memory_findings, gpu_share_findings, nvme_findings
from graftwork.cluster.jobs.environment import why_secret_text
from graftwork.cluster.jobs.models import Attempt, Demand, Finding, Job, TargetMachines
from graftwork.cluster.kuberay.object_view import Found, dig, refuse, warn
from graftwork.cluster.kuberay.objects import build_rayjob
from graftwork.cluster.kuberay.pods import SCRATCH_PATH
from graftwork.cluster.kuberay.rules import check_rules
from graftwork.cluster.kuberay.schema import check_schema
from graftwork.cluster.kuberay.spec_checks import check_spec
from graftwork.cluster.spec import ClusterSpec, WorkerSpec, quantity
from graftwork.planning.hardware import gpu_called
from graftwork.planning.memory import HEADROOM

GIB = 2**30
OWN_PROGRAMS = frozenset({"exec", "experiment", "rag", "cluster"})
"""Kinds without a plan: a user's own program may use GPUs that no key of its spec names."""


def check_fit(job: Job) -> Found:
    """All findings on demand against machines, and on the limits."""
    for demand in job.demands:
        yield from _machines(job, demand)
    yield from _fixed(job)
    yield from _gpus(job)
    yield from gpu_share_findings(job)
    yield from nvme_findings(job, _writable(job))
    yield from _unused(job)
    yield from _limits(job)


def machines_of(cluster: ClusterSpec) -> TargetMachines:
    """The worker groups at their largest."""
    groups = [(group, group.max_count or group.count) for group in cluster.workers]
    with_gpus = [(group, count) for group, count in groups if group.gpu and count]
    names = ", ".join(group.name for group, _ in with_gpus)
    return TargetMachines(
        owner=f"cluster group {names}" if names else "the cluster's file",
        cpus=sum(count * quantity(group.cpu) for group, count in groups),
        memory_bytes=int(sum(count * quantity(group.memory) for group, count in groups)),
        gpus=float(sum(count * group.gpu for group, count in with_gpus)),
        gpu_types=tuple(dict.fromkeys(group.gpu_type or "" for group, _ in with_gpus)),
    )


def workers_in(group: WorkerSpec, demand: Demand, count: int) -> int:
    """How many workers of the demand `count` machines of a group hold, each on one machine."""
    rooms = [math.ceil(quantity(group.cpu)) / demand.cpus_per_worker] if demand.cpus_per_worker else []
    rooms += [group.gpu / demand.gpus_per_worker] if demand.gpus_per_worker else []
    if demand.memory_bytes_per_worker:
        rooms.append(HEADROOM * quantity(group.memory) / demand.memory_bytes_per_worker)
    return int(min(rooms, default=demand.num_workers) + 1e-9) * count


def _machines(job: Job, demand: Demand) -> Found:
    cluster, serves = job.cluster, job.kind == "serve"
    counts = [(group.max_count or group.count) if serves else group.count for group in cluster.workers]
    room = sum(workers_in(group, demand, count) for group, count in zip(cluster.workers, counts, strict=True))
    if demand.gpus_per_worker and not any(group.gpu for group in cluster.workers):
        yield refuse(
            "FIT-NO-GPU",
            "workers",
            "no group has a GPU",
            f"a worker takes {demand.gpus_per_worker:g}",
            "workers: [{name: gpu, gpu: 1, ...}]",
        )
    elif not any(workers_in(group, demand, 1) for group in cluster.workers):
        yield refuse(
            "FIT-WORKER",
            "workers",
            f"no machine holds a worker: {_describe_machines(cluster)}",
            f"a worker takes {_describe_worker(demand)}, on one machine",
            "larger machines, or smaller workers",
        )
    elif room < demand.num_workers:
        yield refuse(
            "FIT-WORKERS",
            "workers",
            f"room for {room} workers: {_describe_machines(cluster)}",
            f"{demand.num_workers} workers run at the same time, {_describe_worker(demand)} each",
            f"more machines, or num_workers={room}" if room else "set `count`",
        )


def _fixed(job: Job) -> Found:
    for index, group in enumerate(job.cluster.workers):
        if group.max_count is not None and group.max_count > group.count and job.kind != "serve":
            yield warn(
                "FIT-FIXED",
                f"workers[{index}].max_count",
                f"{group.max_count} over count={group.count}",
                "training and sweeps take fixed gangs: `count` machines are started",
                f"count: {group.max_count}, or drop max_count",
            )


def _gpus(job: Job) -> Found:
    for index, group in enumerate(job.cluster.workers):
        where, known = f"workers[{index}].gpu_type", gpu_called(group.gpu_type or "")
        if group.gpu_type is not None and not group.gpu:
            yield refuse("GPU-NONE", where, f"{group.gpu_type} with gpu: 0", "a type needs a number", "gpu: 1")
            continue
        if group.gpu_type is not None and not group.node_selector:
            yield warn(
                "GPU-ANY",
                where,
                f"{group.gpu_type}, and no node_selector",
                "Kubernetes may take any node with GPUs",
                "node_selector: the label of such nodes",
            )
        if group.gpu and (group.gpu_type is not None or job.demand.gpus_per_worker):
            name = group.gpu_type or ""
            yield from gpu_memory_findings(job, where, name, None if known is None else known.memory_bytes)


def _writable(job: Job) -> tuple[str, ...]:
    """Folders of a pod that take files, its file system being read-only."""
    claim = job.root.removeprefix("file://") if job.cluster.storage.claim is not None else None
    return (SCRATCH_PATH, "/tmp", *([claim] if claim else []))


def _unused(job: Job) -> Found:
    """GPUs that the job's machines have and its workers do not use."""
    reserved = sum(group.gpu * group.count for group in job.cluster.workers)
    used = job.demand.num_workers * job.demand.gpus_per_worker
    if not reserved or job.kind in OWN_PROGRAMS or (job.kind != "train" and used):
        return  # sweeps and endpoints grow into what is there
    if used < reserved:
        yield warn(
            "GPU-UNUSED",
            "workers",
            f"the job reserves {reserved} GPUs, and its workers use {used:g}",
            "a GPU costs its price as long as the job holds it, used or not",
            "set gpus_per_worker (num_gpus of an endpoint) to auto, raise num_workers, or reserve fewer GPUs",
        )


def _limits(job: Job) -> Found:
    limits, seconds = job.cluster.limits, job.demand.seconds
    if limits.budget_usd is not None:
        yield from _budget(job, limits.budget_usd)
    elif job.cluster.prices is not None:
        for index in unpriced(job.cluster):
            kind = job.cluster.workers[index].gpu_type
            yield warn(
                "GPU-NO-PRICE",
                f"workers[{index}].gpu_type",
                f"{kind or 'a GPU without a type'} has no price",
                "the job's price is not known without it",
                f"add prices.gpu_hour.{kind or 'default'}: PRICE_PER_HOUR",
            )
    if limits.deadline is not None and seconds is not None and seconds > limits.deadline:
        yield warn(
            "FIT-DEADLINE",
            "limits.deadline",
            f"{limits.deadline:.0f} s, predicted {seconds:.0f} s",
            "at the deadline it stops with a checkpoint",
            "a longer deadline, or resubmit afterwards",
        )


def _budget(job: Job, budget: float) -> Found:
    prices, predicted = job.cluster.prices, predicted_usd(job)
    if prices is None or usd_per_hour(job.cluster) == 0:
        yield refuse(
            "BUDGET-NO-PRICES",
            "limits.budget_usd",
            f"{budget:g} without prices",
            "a budget is held by `prices`",
            "prices: {cpu_hour: 0.04, gpu_hour: {H100: 4.5}}",
        )
        return
    for index in unpriced(job.cluster):
        group = job.cluster.workers[index]
        yield refuse(
            "BUDGET-NO-PRICE",
            f"workers[{index}].gpu_type",
            f"{group.gpu_type} has no price",
            "a budget needs each GPU's price",
            f"add prices.gpu_hour.{group.gpu_type or 'default'}: PRICE_PER_HOUR",
        )
    if predicted is not None and predicted > budget:
        yield warn(
            "FIT-BUDGET",
            "limits.budget_usd",
            f"{budget:.2f}, predicted {predicted:.2f}",
            "at the budget it stops with a checkpoint",
            "a larger budget, or resubmit afterwards",
        )


def _describe_worker(demand: Demand) -> str:
    parts = [f"{demand.cpus_per_worker:g} CPU"]
    parts += [f"{demand.gpus_per_worker:g} GPU"] if demand.gpus_per_worker else []
    parts += [f"{demand.memory_bytes_per_worker / GIB:.1f} GiB"] if demand.memory_bytes_per_worker else []
    return ", ".join(parts)


def _describe_machines(cluster: ClusterSpec) -> str:
    return "; ".join(
        f"{group.count} x {group.name} (cpu {group.cpu}, memory {group.memory}, gpu {group.gpu})"
        for group in cluster.workers
    )


# All that can be said of a job for KubeRay without asking its cluster: the spec, the fit, the rules, the schema.


ANY_WHEEL = "wheels/graftwork-0+000000000000-py3-none-any.whl"
"""Stands for the wheel, which is built and written after preflight."""


def preflight(
    attempt: Attempt,
    namespace: str,
    crd: Mapping[str, Any] | None = None,
    objects: Sequence[Mapping[str, Any]] | None = None,
) -> list[Finding]:
    """Findings on an attempt, errors first; each code and fact once. Pure: nothing is reached or written.

    `objects` are what would be made, where it is not a RayJob alone; `crd` is the live definition of their kind.
    """
    job = attempt.job
    if objects is None:
        wheel = f"{job.root}/{ANY_WHEEL}" if job.cluster.code == "wheel" else None
        objects = [build_rayjob(attempt, namespace, wheel)]
    found = [*check_spec(job, namespace), *check_fit(job)]
    for made in objects:
        found += [*check_rules(made), *check_schema(made, crd if _is_of(made, crd) else None)]
    return once(found)


def once(found: Iterable[Finding]) -> list[Finding]:
    """Errors first; what two pods have in common is said of the first."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in map(_masked, found):
        first.setdefault((finding.code, finding.problem), finding)
    return sorted(first.values(), key=lambda finding: finding.level)


def _masked(finding: Finding) -> Finding:
    """Without a value that looks like a secret, whichever rule quotes it."""
    hidden: dict[str, Any] = {
        name: "(hidden)"
        for name in ("where", "problem", "rule", "hint")
        if why_secret_text(getattr(finding, name)) is not None
    }
    return replace(finding, **hidden) if hidden else finding


def _is_of(made: Mapping[str, Any], crd: Mapping[str, Any] | None) -> bool:
    return crd is not None and dig(crd, "spec", "names", "kind") == made.get("kind")
