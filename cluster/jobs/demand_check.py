"""Findings on a job's demand and settings that are the same in every place: GPU memory, shares of GPUs, disks."""

from collections.abc import Iterator, Mapping
from typing import Any

from graftwork.cluster.jobs.models import Finding, Job
from graftwork.planning.memory import HEADROOM

GIB = 2**30
GANGS = frozenset({"train", "trial"})
"""Kinds whose workers are ranks of one run."""


def gpu_memory_findings(job: Job, where: str, name: str, memory_bytes: int | None) -> Iterator[Finding]:
    """The predicted peak of a worker against a GPU that it may be placed on; None: the GPU's memory is not known.

    A worker computes on one GPU, however many it reserves, and on a share of one has that share of the memory.
    """
    wanted, share = max(one.gpu_memory_bytes_per_worker for one in job.demands), min(job.demand.gpus_per_worker, 1.0)
    if memory_bytes is None:
        yield Finding(
            "W-GPU-UNKNOWN",
            "warning",
            where,
            f"GPUs of type {name or '(none named)'}",
            "a GPU's memory is compared with the predicted peak where its type is known",
            "name a type that `graftwork plan --gpu` knows",
        )
    elif wanted > HEADROOM * memory_bytes * share:
        part = "" if share == 1.0 else f", of which a worker gets {share:g}"
        yield Finding(
            "E-FIT-GPU-MEMORY",
            "error",
            where,
            f"{name} has {memory_bytes / GIB:.1f} GiB{part}",
            f"a worker's predicted peak is {wanted / GIB:.1f} GiB; a run may use {HEADROOM:.0%} of a GPU",
            "a larger GPU, or what `graftwork plan` suggests",
        )


def gpu_share_findings(job: Job) -> Iterator[Finding]:
    """Shares of a GPU that Ray gives out and the workers can't compute on."""
    each, workers = job.demand.gpus_per_worker, job.demand.num_workers
    key = {"train": "gpus_per_worker", "tune": "train.gpus_per_worker"}.get(job.kind, "num_gpus")
    if each > 1 and each != int(each):
        yield Finding(
            "E-GPU-SHARE", "error", key, f"{each:g}", "Ray gives out whole GPUs above 1", f"set {key}={int(each)}"
        )
    elif 0 < each < 1 and workers > 1 and job.kind in GANGS:
        yield Finding(
            "E-GPU-SHARE",
            "error",
            key,
            f"{workers} workers with {each:g} GPU each",
            "NCCL takes one rank per GPU: two ranks on one GPU fail with `Duplicate GPU detected`",
            f"set {key}=1, or num_workers=1",
        )


def nvme_findings(job: Job, writable: tuple[str, ...] | None) -> Iterator[Finding]:
    """An offload to disks: what the machines need for it. `writable`: the folders that pods write to; None: any."""
    strategy: Mapping[str, Any] = _training(job.spec).get("strategy") or {}
    key = next((key for key in ("offload_optimizer", "offload_weights") if strategy.get(key) == "nvme"), None)
    if key is None:
        return
    path = str(strategy.get("nvme_path"))
    if writable is not None and not any(path == folder or path.startswith(f"{folder}/") for folder in writable):
        yield Finding(
            "E-NVME-PATH",
            "error",
            "strategy.nvme_path",
            f"{path} can't be written in a pod",
            f"a pod writes to {', '.join(writable)}; cluster.yaml mounts no disk of the node",
            f"set strategy.nvme_path={writable[0]}/offload, or strategy.{key}=cpu",
        )
    yield Finding(
        "W-NVME-IMAGE",
        "warning",
        f"strategy.{key}",
        "nvme: DeepSpeed builds async_io where the workers run",
        "each machine or image needs libaio (libaio-dev), a C++ compiler and a local NVMe disk at nvme_path",
        f"add them, or set strategy.{key}=cpu",
    )


def _training(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    part = spec.get("train")
    return part if isinstance(part, Mapping) else spec
