"""A run of `train`: memory of a worker, seconds of a step and of the whole."""

import math
from collections.abc import Iterator

from graftwork.memory import GIB, RowSizes, predict_training
from graftwork.model_shape import ModelShape
from graftwork.plan.hardware import Machine
from graftwork.plan.seconds import RAY_TRAIN_START_S, START_S, evaluation_seconds, step_seconds
from graftwork.plan.settle import settle
from graftwork.plan.stage import StagePlan, charged, verdict_of
from graftwork.plan.ways_out import training_ways_out
from graftwork.training.spec import TrainSpec


def plan_training(
    spec: TrainSpec, model: ModelShape, rows: RowSizes, held_out: RowSizes | None, machine: Machine
) -> StagePlan:
    """A run of `train`. `rows` and `held_out`: sizes of the rendered rows. Raises ConfigError as `settle` does."""
    settled = settle(spec, model, rows, machine)
    spec, workers = settled.spec, settled.spec.num_workers
    steps = max(1, math.ceil(spec.optim.epochs * rows.count / spec.optim.rows_per_step - 1e-9))
    evals = math.ceil(steps / spec.eval_every)
    eval_s = evaluation_seconds(spec, model, held_out, machine, workers) if held_out else 0.0
    start_s = RAY_TRAIN_START_S + START_S / machine.pace(workers, 1)
    memory = predict_training(spec, model, rows, value_bytes=machine.value_bytes)
    peak = round(memory.peak_bytes * machine.peaks.ratio)
    learned = machine.peaks.runs > 0
    step_s = step_seconds(spec, model, rows, machine, workers)
    host = (f"{memory.host_bytes / GIB:.1f} GiB of the machine's own memory a worker",) if memory.host else ()
    return StagePlan(
        stage=f"train {spec.name}",
        processes=workers,
        peak_bytes_per_process=peak,
        total_bytes=peak * workers,
        seconds=start_s + steps * step_s + evals * eval_s,
        verdict=verdict_of(
            charged(memory.peak_bytes, workers, machine), machine, training_ways_out(spec, model, rows, machine)
        ),
        parts=(*memory.parts, *((("as measured here", peak - memory.peak_bytes),) if learned else ())),
        assumptions=(
            f"{steps} steps of {spec.optim.rows_per_step} rows",
            *settled.notes,
            *memory.assumptions,
            *host,
            *((machine.peaks.said(),) if learned else ()),
            machine.said(),
        ),
        step_s=step_s,
        warnings=tuple(_warnings(spec, machine)),
        host_bytes_per_process=memory.host_bytes,
    )


def _warnings(spec: TrainSpec, machine: Machine) -> Iterator[str]:
    if spec.quant.kind == "int8":
        yield "quant.kind=int8 trains slower than none and nf4 and needs more memory than nf4: take one of them"
    if machine.gpu is not None and not machine.gpu.has_bf16:
        yield f"{machine.gpu.name} (SM {machine.gpu.sm}) has no bfloat16: computes in float32, twice the memory"
