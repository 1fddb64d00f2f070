"""Predicts a sweep: the trials that will run, at most as many at once as asked for."""

import math
from dataclasses import replace

from graftwork.memory import RowSizes, predict_training
from graftwork.model_shape import ModelShape
from graftwork.plan import (
    RAY_TUNE_START_S,
    START_S,
    Machine,
    StagePlan,
    charged,
    evaluation_seconds,
    settle,
    step_seconds,
    training_ways_out,
    verdict_of,
)
from graftwork.training.spec import TrainSpec
from graftwork.tuning.finals import most_repeats
from graftwork.tuning.search import Drawn, Population, search_of
from graftwork.tuning.search.drawn import random_search
from graftwork.tuning.search_spec import PbtSpec
from graftwork.tuning.space import Values, trial_spec
from graftwork.tuning.spec import TuneSpec


def plan_tuning(spec: TuneSpec, model: ModelShape, rows: RowSizes, held_out: RowSizes, machine: Machine) -> StagePlan:
    """`rows` and `held_out`: sizes of the rendered rows of `spec.train`; `spec.eval_rows` of the latter are scored.

    The largest trial is taken for the memory. Where a scheduler stops trials, one in `reduction` goes on at each rung.
    """
    held_out = replace(held_out, count=min(held_out.count, spec.eval_rows))
    trials = [settled_trial(spec, trial_spec(spec, point), model, rows, machine) for point in points_to_plan(spec)]
    plans = [predict_training(trial, model, rows, value_bytes=machine.value_bytes) for trial in trials]
    largest, memory = max(zip(trials, plans, strict=True), key=lambda pair: pair[1].peak_bytes)
    at_once = max(1, min(spec.max_concurrent, len(trials), int(machine.cores // largest.cpus_per_worker)))
    each_s = [_trial_seconds(spec, trial, model, rows, held_out, machine, at_once) for trial in trials]
    start_s, share = START_S / machine.pace(at_once, 1), expected_share(spec, len(trials))
    start_s *= starts(spec)
    all_s = sum(start_s + share * taken_s for taken_s in each_s) / at_once
    finals_s = math.ceil(most_repeats(spec) / at_once) * (start_s + max(each_s))
    shared_by = 1 if machine.gpu is not None else at_once
    ways_out = ((setting, size * shared_by) for setting, size in training_ways_out(largest, model, rows, machine))
    return StagePlan(
        stage="tune",
        processes=at_once,
        peak_bytes_per_process=memory.peak_bytes,
        total_bytes=memory.peak_bytes * at_once,
        seconds=RAY_TUNE_START_S + max(all_s, start_s + max(each_s)) + finals_s,  # someone runs to the end
        verdict=verdict_of(charged(memory.peak_bytes, at_once, machine), machine, ways_out),
        parts=memory.parts,
        assumptions=(
            f"{len(trials)} trials of {spec.steps} steps, {at_once} at once, {share:.0%} of the steps taken",
            *([f"{most_repeats(spec)} whole runs more for the finals"] if spec.finals else []),
            *memory.assumptions,
            machine.said(),
        ),
    )


def settled_trial(spec: TuneSpec, trial: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine) -> TrainSpec:
    """A trial without `auto`, for the share of the memory that it has. Raises ConfigError where nothing fits."""
    share = machine.memory_bytes if machine.gpu is not None else machine.memory_bytes // spec.max_concurrent
    return settle(trial, model, rows, replace(machine, memory_bytes=share)).spec


def _trial_seconds(
    spec: TuneSpec,
    trial: TrainSpec,
    model: ModelShape,
    rows: RowSizes,
    held_out: RowSizes,
    machine: Machine,
    at_once: int,
) -> float:
    """Steps and evaluations of a trial that is not stopped."""
    evals = math.ceil(spec.steps / spec.report_every)
    step_s = step_seconds(trial, model, rows, machine, at_once)
    return spec.steps * step_s + evals * evaluation_seconds(trial, model, held_out, machine, at_once)


def expected_share(spec: TuneSpec, trials: int) -> float:
    """Share of all trials' steps that are taken when one trial in `reduction` goes on at each rung."""
    if spec.scheduler is None:
        return 1.0
    taken = 0.0
    for part, rungs in spec.scheduler.ladders(spec.steps):
        last, alive = 0, part * trials
        for rung in (*rungs, spec.steps):
            taken += alive * (rung - last)
            last, alive = rung, max(min(1.0, alive), alive / spec.scheduler.reduction)
    return taken / (trials * spec.steps)


def starts(spec: TuneSpec) -> int:
    """Processes that a trial takes, one after the other: a member of a population one a segment."""
    return spec.steps // spec.search.every if isinstance(spec.search, PbtSpec) else 1


def points_to_plan(spec: TuneSpec) -> tuple[Values, ...]:
    """The points that will run where the search knows them; else as many drawn at random, the space's corners first."""
    search = search_of(spec)
    return search.points if isinstance(search, Drawn | Population) else random_search(spec).points
