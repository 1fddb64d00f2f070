"""Whether a job's demand fits the machines that its cluster's spec asks for, and its time and price its limits."""

import math

from graftwork.cluster.backend import Demand, Job
from graftwork.cluster.cost import predicted_usd, usd_per_hour
from graftwork.cluster.kuberay.findings import Found, refuse, warn
from graftwork.cluster.spec import ClusterSpec, WorkerSpec, quantity
from graftwork.plan.gpus import gpu_called

GIB = 2**30


def check_fit(job: Job) -> Found:
    """All findings on demand against machines, and on the limits."""
    yield from _machines(job)
    yield from _gpus(job)
    yield from _limits(job)


def workers_in(group: WorkerSpec, demand: Demand, count: int) -> int:
    """How many workers of the demand `count` machines of a group hold, each on one machine."""
    rooms = [math.ceil(quantity(group.cpu)) / demand.cpus_per_worker] if demand.cpus_per_worker else []
    rooms += [group.gpu / demand.gpus_per_worker] if demand.gpus_per_worker else []
    if demand.memory_bytes_per_worker and not demand.gpus_per_worker:  # on a GPU the peak is the GPU's
        rooms.append(quantity(group.memory) / demand.memory_bytes_per_worker)
    return int(min(rooms, default=demand.num_workers) + 1e-9) * count


def _machines(job: Job) -> Found:
    demand, cluster, serves = job.demand, job.cluster, job.kind == "serve"
    counts = [(group.max_count or group.count) if serves else group.count for group in cluster.workers]
    room = sum(workers_in(group, demand, count) for group, count in zip(cluster.workers, counts, strict=True))
    if demand.gpus_per_worker and not any(group.gpu for group in cluster.workers):
        yield refuse("FIT-NO-GPU", "workers", "no group has a GPU", f"a worker takes {demand.gpus_per_worker:g}",
                     "workers: [{name: gpu, gpu: 1, ...}]")  # fmt: skip
    elif not any(workers_in(group, demand, 1) for group in cluster.workers):
        yield refuse(
            "FIT-WORKER",
            "workers",
            f"no machine holds a worker: {_machines_said(cluster)}",
            f"a worker takes {_worker_said(demand)}, on one machine",
            "larger machines, or smaller workers",
        )
    elif room < demand.num_workers:
        yield refuse("FIT-WORKERS", "workers", f"room for {room} workers: {_machines_said(cluster)}",
                     f"{demand.num_workers} workers run at the same time, {_worker_said(demand)} each",
                     f"more machines, or num_workers={room}" if room else "set `count`")  # fmt: skip
    for index, group in enumerate(cluster.workers):
        if group.max_count is not None and group.max_count > group.count and not serves:
            yield warn("FIT-FIXED", f"workers[{index}].max_count", f"{group.max_count} over count={group.count}",
                       "training and sweeps take fixed gangs: `count` machines are started",
                       f"count: {group.max_count}, or drop max_count")  # fmt: skip


def _gpus(job: Job) -> Found:
    demand = job.demand
    for index, group in enumerate(job.cluster.workers):
        where = f"workers[{index}].gpu_type"
        if group.gpu_type is None:
            continue
        if not group.gpu:
            yield refuse("GPU-NONE", where, f"{group.gpu_type} with gpu: 0", "a type needs a number", "gpu: 1")
            continue
        if not group.node_selector:
            yield warn("GPU-ANY", where, f"{group.gpu_type}, and no node_selector",
                       "Kubernetes may take any node with GPUs", "node_selector: the label of such nodes")  # fmt: skip
        known = gpu_called(group.gpu_type)
        if known is None:
            yield warn(
                "GPU-UNKNOWN", where, repr(group.gpu_type), "its memory is not known: nothing was held against it"
            )
        elif demand.gpus_per_worker and demand.memory_bytes_per_worker > known.memory_bytes * demand.gpus_per_worker:
            yield refuse("FIT-GPU-MEMORY", where, f"{known.name} has {known.memory_gib:.1f} GiB",
                         f"a worker's predicted peak is {demand.memory_bytes_per_worker / GIB:.1f} GiB",
                         "a larger GPU, or what `graftwork plan` suggests")  # fmt: skip


def _limits(job: Job) -> Found:
    limits, seconds = job.cluster.limits, job.demand.seconds
    if limits.budget_usd is not None:
        yield from _budget(job, limits.budget_usd)
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
    if prices is None or not usd_per_hour(job.cluster):
        yield refuse(
            "BUDGET-NO-PRICES",
            "limits.budget_usd",
            f"{budget:g} without prices",
            "a budget is held by `prices`",
            "prices: {cpu_hour: 0.04, gpu_hour: {H100: 4.5}}",
        )
        return
    for index, group in enumerate(job.cluster.workers):
        if group.gpu and (group.gpu_type or "") not in prices.gpu_hour and "default" not in prices.gpu_hour:
            yield refuse(
                "BUDGET-NO-PRICE",
                f"workers[{index}].gpu_type",
                f"{group.gpu_type} has no price",
                "a budget needs each GPU's price",
                f"prices.gpu_hour.{group.gpu_type or 'default'}",
            )
    if predicted is not None and predicted > budget:
        yield warn("FIT-BUDGET", "limits.budget_usd", f"{budget:.2f}, predicted {predicted:.2f}",
                   "at the budget it stops with a checkpoint", "a larger budget, or resubmit afterwards")  # fmt: skip


def _worker_said(demand: Demand) -> str:
    parts = [f"{demand.cpus_per_worker:g} CPU"]
    parts += [f"{demand.gpus_per_worker:g} GPU"] if demand.gpus_per_worker else []
    parts += [f"{demand.memory_bytes_per_worker / GIB:.1f} GiB"] if demand.memory_bytes_per_worker else []
    return ", ".join(parts)


def _machines_said(cluster: ClusterSpec) -> str:
    return "; ".join(
        f"{group.count} x {group.name} (cpu {group.cpu}, memory {group.memory}, gpu {group.gpu})"
        for group in cluster.workers
    )
