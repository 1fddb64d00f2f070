"""Predicts a sweep: the trials that will run, at most as many at once as asked for."""

import math
from dataclasses import replace

from graftwork.memory import RowSizes, predict_training
from graftwork.model_shape import ModelShape
from graftwork.plan import Machine, StagePlan, training_seconds, training_ways_out, verdict_of
from graftwork.tuning.space import draw, trial_spec
from graftwork.tuning.spec import TuneSpec


def plan_tuning(spec: TuneSpec, model: ModelShape, rows: RowSizes, held_out: RowSizes, machine: Machine) -> StagePlan:
    """`rows` and `held_out`: sizes of the rendered rows of `spec.train`; `spec.eval_rows` of the latter are scored.

    The largest trial is taken for the memory. Where a scheduler stops trials, one in `reduction` goes on at each rung.
    """
    held_out = replace(held_out, count=min(held_out.count, spec.eval_rows))
    trials = [trial_spec(spec, point) for point in draw(spec).points]
    plans = [predict_training(trial, model, rows, value_bytes=machine.value_bytes) for trial in trials]
    largest, memory = max(zip(trials, plans, strict=True), key=lambda pair: pair[1].peak_bytes)
    at_once = max(1, min(spec.max_concurrent, len(trials), int(machine.cores // largest.cpus_per_worker)))
    whole_s = sum(
        training_seconds(trial, model, rows, held_out, machine, spec.steps, math.ceil(spec.steps / spec.report_every))
        for trial in trials
    )
    share = expected_share(spec, len(trials))
    stretch = machine.stretch(at_once, largest.cpus_per_worker)
    ways_out = ((setting, size * at_once) for setting, size in training_ways_out(largest, model, rows, machine))
    return StagePlan(
        stage="tune",
        processes=at_once,
        peak_bytes_per_process=memory.peak_bytes,
        total_bytes=memory.peak_bytes * at_once,
        seconds=whole_s * share * stretch / at_once,
        verdict=verdict_of(memory.peak_bytes * at_once, machine, ways_out),
        parts=memory.parts,
        assumptions=(
            f"{len(trials)} trials of {spec.steps} steps, {at_once} at once, {share:.0%} of the steps taken",
            *memory.assumptions,
            machine.said(),
        ),
    )


def expected_share(spec: TuneSpec, trials: int) -> float:
    """Share of all trials' steps that are taken when one trial in `reduction` goes on at each rung."""
    if spec.scheduler is None:
        return 1.0
    taken, last, alive = 0.0, 0, float(trials)
    for rung in (*spec.scheduler.rungs(spec.steps), spec.steps):
        taken += alive * (rung - last)
        last, alive = rung, max(1.0, alive / spec.scheduler.reduction)
    return taken / (trials * spec.steps)
