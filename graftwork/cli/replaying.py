"""A training spec's line of the plan, with the peak of the replayed step in place of the closed form's."""

from dataclasses import replace

from graftwork import base_model
from graftwork.memory import FP32, MemoryPlan, predict_training
from graftwork.memory.sizes import TokenWork
from graftwork.memory.training import ALLOCATOR_SHARE, FRAGMENTS
from graftwork.model_shape import ModelShape
from graftwork.plan import (
    Machine,
    StagePlan,
    charge_bytes,
    plan_training,
    resolve_auto,
    suggest_training_changes,
    verdict_of,
)
from graftwork.training.adapter_spec import FullSpec
from graftwork.training.data import prepare
from graftwork.training.settled import machine_of, sizes_of
from graftwork.training.spec import TrainSpec

STEP = "step, replayed"
SHOWN = ("process", "base weights", "trained weights", "optimizer", "buffers", "CUDA")
"""Parts of the closed form that are kept: what workers share and what is no tensor."""


def placed(spec: TrainSpec, machine: Machine) -> Machine:
    """The machine in the dtype that the spec computes in there; where it asks for GPUs, the ones that there are."""
    return machine.at(spec.quant) if machine.gpu or not spec.gpus else machine_of(spec)


def replayed_line(spec: TrainSpec, machine: Machine, outcomes: TokenWork | None = None) -> StagePlan:
    """`outcomes`: measured before and after. Raises ConfigError for what cannot be replayed."""
    base_model.import_bitsandbytes()
    from graftwork.training.replay import Replayed, replay

    base, data = base_model.resolve(spec.base), prepare(spec)
    shape, rows, machine = ModelShape.from_config(base.config), sizes_of(data.train), placed(spec, machine)
    held_out = sizes_of(data.eval) if data.eval is not None else None
    line = plan_training(spec, shape, rows, held_out, machine, outcomes)
    spec = resolve_auto(spec, shape, rows, machine).spec
    whole = isinstance(spec.adapter, FullSpec) and machine.gpu is None
    found: Replayed = replay(spec, base.config, rows, value_bytes=FP32 if whole else machine.value_bytes)
    closed = predict_training(spec, shape, rows, value_bytes=machine.value_bytes)
    parts = _parts(closed, found.step_bytes, on_gpu=machine.gpu is not None)
    peak = sum(size for _, size in parts)
    workers = spec.num_workers
    return replace(
        line,
        peak_bytes_per_process=peak,
        total_bytes=peak * workers,
        parts=parts,
        verdict=verdict_of(
            charge_bytes(peak, workers, machine), machine, suggest_training_changes(spec, shape, rows, machine)
        ),
        assumptions=(
            *line.assumptions,
            f"the step was replayed on tensors without memory in {found.seconds:.1f} s; the closed form says "
            f"{closed.peak_bytes / 2**30:.2f} GiB ({closed.peak_bytes / peak - 1:+.1%})",
        ),
    )


def _parts(closed: MemoryPlan, step: int, *, on_gpu: bool) -> tuple[tuple[str, int], ...]:
    kept = {name: size for name, size in closed.parts if name in SHOWN}
    kept[STEP] = step
    if on_gpu:
        kept["fragments"] = round(FRAGMENTS * (sum(kept.values()) - kept.get("CUDA", 0)))
    else:
        kept["allocator"] = round(ALLOCATOR_SHARE * step)
    return tuple(kept.items())
