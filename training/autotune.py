"""Automatic values (`auto`) of a run, from its earlier attempt or from the plan; peaks that correct plans."""

from typing import Any

import yaml

from graftwork.base import load as base_model
from graftwork.base.load import ResolvedBase
from graftwork.base.model_shape import ModelShape
from graftwork.errors import ConfigError
from graftwork.planning.hardware import Gpu, Machine, gpu_called, gpu_here, learn
from graftwork.planning.memory import RowSizes
from graftwork.quantization import compute_dtype
from graftwork.storage.store import RunPaths
from graftwork.training.objectives.row_cache import Rows
from graftwork.training.planning.memory import allocated, kind_of, predict_training
from graftwork.training.planning.plan import has_auto, resolve_auto
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob

LEAST_STEPS = 2
"""The first makes the optimizer's state; the second has all at once."""


class FinalPeak:
    """Counts the steps of a worker that reports to nobody, and compares the run's peak with the prediction at its end.

    The peak grows over a run where rows differ in length: what was freed for one shape is not always reused for others.
    """

    def __init__(self, job: TrainJob) -> None:
        self.job, self.steps = job, 0

    def __call__(self, step: StepReport) -> bool:
        """Go on in any case."""
        self.steps += 1
        return True

    def learn(self, result: LoopResult) -> None:
        """Take the largest peak of all workers into account; nothing where too few steps were taken here."""
        import torch

        spec = self.job.spec
        if self.steps < LEAST_STEPS:
            return
        cuda = torch.cuda.is_available() and spec.gpus > 0
        shape = ModelShape.from_config(base_model.resolve(spec.base).config)
        if shape.unplanned:
            return
        value_bytes = compute_dtype(spec.quant, "cuda" if cuda else "cpu")[0].itemsize
        plan = predict_training(spec, shape, sizes_of(self.job.data.train), value_bytes=value_bytes)
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
    before = _before(paths)
    if before is not None:
        return spec.with_(before), tuple(f"{key}={value} (as the run began)" for key, value in before.items())
    found = resolve_auto(spec, ModelShape.from_config(base.config), sizes_of(rows), machine_of(spec))
    return found.spec, found.notes


def sizes_of(rows: Rows) -> RowSizes:
    """Sizes of rendered rows, as plans take them."""
    return RowSizes.from_lengths(rows.lengths_N.tolist(), rows.scored_N.tolist(), rows.widths_N.tolist())


def machine_of(spec: TrainSpec) -> Machine:
    """What the workers of a run get: the cluster's GPUs, or this machine's CPUs. Raises ConfigError for an unknown."""
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


def _before(paths: RunPaths) -> dict[str, Any] | None:
    """What was settled by an earlier attempt of this run, from the spec that it wrote."""
    if not paths.store.exists(*paths.spec()):
        return None
    tree = yaml.safe_load(paths.store.read_text(*paths.spec()))
    found = {key: tree[key.partition(".")[0]][key.partition(".")[2]] for key in SETTLED}
    return found if found["optim.micro_batch"] != "auto" != found["optim.gradient_checkpointing"] else None
