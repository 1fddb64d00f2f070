"""What a cluster costs by the user's price table: an hour, a job as predicted, a job at most."""

from graftwork.cluster.backend import Job
from graftwork.cluster.spec import ClusterSpec, PriceTable, WorkerSpec, quantity


def usd_per_hour(cluster: ClusterSpec) -> float | None:
    """Price of head and workers; None without prices, or where a GPU has none: its share would count as free."""
    prices = cluster.prices
    if prices is None or unpriced(cluster):
        return None
    return quantity(cluster.head.cpu) * prices.cpu_hour + sum(_group(group, prices) for group in cluster.workers)


def unpriced(cluster: ClusterSpec) -> list[int]:
    """Numbers of the worker groups whose GPUs the price table does not have."""
    known = cluster.prices.gpu_hour if cluster.prices is not None else {}
    return [number for number, group in enumerate(cluster.workers)
            if group.gpu and (group.gpu_type or "") not in known and "default" not in known]  # fmt: skip


def predicted_usd(job: Job) -> float | None:
    """None without prices or without a predicted time."""
    hour = usd_per_hour(job.cluster)
    return None if hour is None or job.demand.seconds is None else hour * job.demand.seconds / 3600


def most_usd(cluster: ClusterSpec) -> float | None:
    """By the budget or the deadline, whichever stops it first; None where neither does."""
    hour, limits = usd_per_hour(cluster), cluster.limits
    by_deadline = [hour * limits.deadline / 3600] if hour is not None and limits.deadline is not None else []
    bounds = [*by_deadline, *([limits.budget_usd] if limits.budget_usd is not None else [])]
    return min(bounds, default=None)


def _group(group: WorkerSpec, prices: PriceTable) -> float:
    gpu_hour = prices.gpu_hour.get(group.gpu_type or "", prices.gpu_hour.get("default", 0.0))
    hour = quantity(group.cpu) * prices.cpu_hour + group.gpu * gpu_hour
    return group.count * hour * (prices.spot_factor if group.spot else 1.0)
