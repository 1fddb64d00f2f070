"""Automatic values (`auto`) of a run, from its earlier attempt or from the plan; peaks that correct plans."""

import yaml

from graftwork.base.load import ResolvedBase, resolve
from graftwork.base.model_shape import ModelShape
from graftwork.errors import ConfigError
from graftwork.planning.hardware import Gpu, Machine, gpu_called, gpu_here, learn
from graftwork.planning.memory import RowSizes
from graftwork.quantization import compute_dtype
from graftwork.storage.store import RunPaths
from graftwork.training.objectives.protocol import Rows
from graftwork.training.planning.memory import allocated, kind_of, predict_training
from graftwork.training.planning.plan import has_auto, resolve_auto
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob

LEAST_STEPS = 2
"""The first makes the optimizer's state; the second has all at once."""


def learn_peak(job: TrainJob, result: LoopResult) -> None:
    """Correct later predictions by the largest peak of all workers; nothing where too few steps were taken.

    At a run's end: its peak grows where rows differ in length, as memory freed for one shape does not fit all others.
    """
    import torch

    spec = job.spec
    shape = ModelShape.from_config(resolve(spec.base).config)
    if result.steps_this_attempt < LEAST_STEPS or shape.unplanned:
        return
    cuda = torch.cuda.is_available() and spec.gpus > 0
    value_bytes = compute_dtype(spec.quant, "cuda" if cuda else "cpu")[0].itemsize
    plan = predict_training(spec, shape, sizes_of(job.data.train), value_bytes=value_bytes)
    if not cuda:
        learn("cpu", kind_of(spec), plan.peak_bytes, max(result.peak_rss_bytes_per_worker))
    elif (gpu := gpu_here()) is not None:
        learn(gpu.name, kind_of(spec), allocated(plan), max(result.peak_cuda_bytes_per_worker))


SETTLED = ("optim.micro_batch", "optim.gradient_checkpointing", "quant.resident")


def resolve_auto_for_run(
    spec: TrainSpec, base: ResolvedBase, rows: Rows, paths: RunPaths
) -> tuple[TrainSpec, tuple[str, ...]]:
    """The spec without `auto`, and why it is so. Raises ConfigError where nothing fits, or no GPU is known to fit in.

    A run that goes on keeps the setting that it began with, or its steps would round otherwise.
    """
    if not has_auto(spec):
        return spec, ()
    if paths.store.exists(*paths.spec()):
        tree = yaml.safe_load(paths.store.read_text(*paths.spec()))
        before = {key: tree[key.partition(".")[0]][key.partition(".")[2]] for key in SETTLED}
        if "auto" not in (before["optim.micro_batch"], before["optim.gradient_checkpointing"]):
            return spec.with_(before), tuple(f"{key}={value} (as the run began)" for key, value in before.items())
    found = resolve_auto(spec, ModelShape.from_config(base.config), sizes_of(rows), machine_of(spec))
    return found.spec, found.notes


def sizes_of(rows: Rows) -> RowSizes:
    """Sizes of rendered rows, as plans take them."""
    return RowSizes.from_lengths(rows.lengths_N.tolist(), rows.scored_N.tolist(), rows.widths_N.tolist())


def machine_of(spec: TrainSpec) -> Machine:
    """Machine of a run's workers: the cluster's GPUs, or this machine's CPUs. Raises ConfigError for an unknown."""
    if not spec.gpus:
        return Machine.detect().at(spec.quant)
    gpu = gpu_here() or _gpu_of_ray()
    if gpu is None:
        raise ConfigError(
            f"gpus_per_worker={spec.gpus:g}",
            "no GPU is seen from here, and Ray names none that the table of the plan has",
            "a plan is made, and auto in optim is settled, for a GPU that is known",
            "graftwork plan FILE --gpu NAME; it says what to set optim.micro_batch and gradient_checkpointing to",
        )
    return Machine.with_gpus(gpu).at(spec.quant)


def _gpu_of_ray() -> Gpu | None:
    """The smallest GPU of the cluster, by Ray's names of accelerators."""
    import ray

    if not ray.is_initialized():
        return None
    names = [key.partition(":")[2] for key in ray.cluster_resources() if key.startswith("accelerator_type:")]
    found = [gpu for gpu in map(gpu_called, names) if gpu is not None]
    return min(found, key=lambda gpu: gpu.memory_gib, default=None)
