"""A run of `train`: memory of a worker, seconds of a step and of the whole."""

import math
from collections.abc import Iterator

from graftwork.memory import GIB, RowSizes
from graftwork.memory.sizes import TokenWork
from graftwork.model_shape import ModelShape
from graftwork.plan.hardware import Machine
from graftwork.plan.seconds import RAY_TRAIN_START_S, START_S, evaluation_seconds, outcomes_seconds, step_seconds
from graftwork.plan.settle import resolve_auto
from graftwork.plan.stage import StagePlan, charge_bytes, verdict_of, worker_memory
from graftwork.plan.ways_out import suggest_training_changes
from graftwork.training.spec import TrainSpec


def plan_training(
    spec: TrainSpec,
    model: ModelShape,
    rows: RowSizes,
    held_out: RowSizes | None,
    machine: Machine,
    outcomes: TokenWork | None = None,
) -> StagePlan:
    """A run of `train`. `rows` and `held_out`: sizes of the rendered rows. `outcomes`: measured before and after.

    Raises ConfigError as `resolve_auto` does.
    """
    settled = resolve_auto(spec, model, rows, machine)
    spec, workers = settled.spec, settled.spec.num_workers
    steps = max(1, math.ceil(spec.optim.epochs * rows.count / spec.optim.rows_per_step - 1e-9))
    evals = math.ceil(steps / spec.eval_every)
    eval_s = evaluation_seconds(spec, model, held_out, machine, workers) if held_out else 0.0
    start_s = RAY_TRAIN_START_S + START_S / machine.pace(workers, 1)
    memory = worker_memory(spec, model, rows, machine)
    peak = memory.peak_bytes
    step_s = step_seconds(spec, model, rows, machine, workers)
    outcomes_s = 2 * outcomes_seconds(spec, model, outcomes, machine, workers) if outcomes else 0.0
    host = (f"{memory.host_bytes / GIB:.1f} GiB of the machine's own memory a worker",) if memory.host else ()
    return StagePlan(
        stage=f"train {spec.name}",
        processes=workers,
        peak_bytes_per_process=peak,
        total_bytes=peak * workers,
        seconds=start_s + steps * step_s + evals * eval_s + outcomes_s,
        verdict=verdict_of(
            charge_bytes(peak, workers, machine), machine, suggest_training_changes(spec, model, rows, machine)
        ),
        parts=memory.parts,
        assumptions=(
            f"{steps} steps of {spec.optim.rows_per_step} rows",
            *settled.notes,
            *memory.assumptions,
            *(
                (f"outcomes take {outcomes_s:.0f} s: {outcomes.describe()}, before and after",)
                if outcomes and outcomes_s
                else ()
            ),
            *host,
            machine.describe(),
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
