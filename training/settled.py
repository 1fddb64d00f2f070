"""`auto` of a run, replaced in the driver: by what an earlier attempt had, or by the plan for this cluster."""

from typing import Any

import yaml

from graftwork.base_model import ResolvedBase
from graftwork.errors import ConfigError
from graftwork.memory import RowSizes
from graftwork.model_shape import ModelShape
from graftwork.plan import Gpu, Machine, gpu_called, gpu_here, has_auto, resolve_auto
from graftwork.storage import RunPaths
from graftwork.training.rows.token_rows import Rows
from graftwork.training.spec import TrainSpec

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
