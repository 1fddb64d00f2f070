"""Prediction of a sweep: its trials, how many run at a time, their memory, time and cost."""

import contextlib
import math
from dataclasses import replace

from graftwork.base.model_shape import ModelShape
from graftwork.errors import ConfigError
from graftwork.planning.hardware import Machine
from graftwork.planning.memory import HEADROOM, START_S, MemoryPlan, RowSizes, StagePlan, charge_bytes, verdict_of
from graftwork.training.planning.plan import (
    RAY_TRAIN_START_S,
    RAY_TUNE_START_S,
    evaluation_seconds,
    resolve_auto,
    step_seconds,
    suggest_training_changes,
    worker_memory,
)
from graftwork.training.spec import TrainSpec
from graftwork.tuning.finals import most_repeats
from graftwork.tuning.search import FixedPoints, Search, Values, grid_size, trial_spec
from graftwork.tuning.search_grid_random import GridSpec, RandomSpec
from graftwork.tuning.search_optuna import TpeSpec
from graftwork.tuning.search_pbt import PbtSearch, PbtSpec
from graftwork.tuning.spec import TuneSpec


def plan_tuning(spec: TuneSpec, model: ModelShape, rows: RowSizes, held_out: RowSizes, machine: Machine) -> StagePlan:
    """`rows` and `held_out`: sizes of the rendered rows of `spec.train`; `spec.eval_rows` of the latter are scored.

    The largest trial is taken for the memory. Where a scheduler stops trials, one in `reduction` goes on at each rung.
    """
    held_out = replace(held_out, count=min(held_out.count, spec.eval_rows))
    trials = [planned_trial(spec, point, model, rows, machine) for point in points_to_plan(spec)]
    plans = [worker_memory(trial, model, rows, machine) for trial in trials]
    largest, memory = max(zip(trials, plans, strict=True), key=lambda pair: pair[1].peak_bytes)
    workers = largest.num_workers
    at_once = _at_once(spec, largest, memory, machine, len(trials))
    evals = math.ceil(spec.steps / spec.report_every)
    each_s = [
        spec.steps * step_seconds(trial, model, rows, machine, at_once)
        + evals * evaluation_seconds(trial, model, held_out, machine, at_once)
        for trial in trials
    ]
    start_s, share = START_S / machine.pace(at_once * workers, 1), expected_share(spec, len(trials))
    start_s += RAY_TRAIN_START_S if workers > 1 else 0.0
    if isinstance(spec.search, PbtSpec):  # a member of a population starts a process for each segment
        start_s *= spec.steps // spec.search.every
    work_s, longest_s = sum(start_s + share * taken_s for taken_s in each_s), start_s + max(each_s)
    finals_s = math.ceil(most_repeats(spec) / at_once) * longest_s
    shared_by = 1 if machine.gpu is not None else at_once
    changes = suggest_training_changes(largest, model, rows, machine)
    return StagePlan(
        stage="tune",
        processes=at_once * workers,
        peak_bytes_per_process=memory.peak_bytes,
        total_bytes=memory.peak_bytes * at_once * workers,
        seconds=RAY_TUNE_START_S + max(work_s / at_once, longest_s) + finals_s,  # someone runs to the end
        verdict=verdict_of(
            charge_bytes(memory.peak_bytes, at_once * workers, machine),
            machine,
            ((one, size * shared_by) for one, size in changes),
        ),
        parts=memory.parts,
        assumptions=(
            f"{len(trials)} trials of {spec.steps} steps, {at_once} at once, {share:.0%} of the steps taken"
            + (f"; each distributed over {workers} workers ({largest.strategy.kind})" if workers > 1 else ""),
            _cost(
                spec,
                largest,
                work_s + most_repeats(spec) * longest_s,
                charge_bytes(memory.peak_bytes, 1, machine),
                machine,
            ),
            *([f"{most_repeats(spec)} whole runs more for the finals"] if spec.finals else []),
            *memory.assumptions,
            machine.describe(),
        ),
        host_bytes_per_process=memory.host_bytes,
    )


def _at_once(spec: TuneSpec, largest: TrainSpec, memory: MemoryPlan, machine: Machine, trials: int) -> int:
    """Trials at a time on this machine, or on one GPU: at most one a core, `max_concurrent`, and as many as fit."""
    most = min(trials, int(machine.cores // (largest.cpus_per_worker * largest.num_workers)))
    if spec.max_concurrent != "auto":
        return max(1, min(most, spec.max_concurrent))
    room = HEADROOM * machine.memory_bytes // charge_bytes(memory.peak_bytes, largest.num_workers, machine)
    return max(1, min(most, int(room)))


def planned_trial(spec: TuneSpec, point: Values, model: ModelShape, rows: RowSizes, machine: Machine) -> TrainSpec:
    """The trial of a point on this machine, or on such GPUs: one process where it fits, else distributed."""
    distributed = trial_spec(spec, point, distributed=True)
    alone_only = spec.distributed == "never" or not shards(distributed)
    if spec.distributed != "always":
        try:
            alone = resolve_auto_trial(spec, trial_spec(spec, point), model, rows, machine)
        except ConfigError:
            if alone_only:
                raise
        else:
            peak = worker_memory(alone, model, rows, machine).peak_bytes
            if alone_only or charge_bytes(peak, 1, machine) <= HEADROOM * machine.memory_bytes:
                return alone
    return resolve_auto_trial(spec, distributed, model, rows, machine)


def shards(trial: TrainSpec) -> bool:
    """Return whether a worker of a distributed trial takes less memory than one process alone."""
    offloads = trial.strategy.offload_optimizer != "none" or trial.strategy.offload_weights != "none"
    return trial.strategy.kind in ("zero3", "fsdp2") or offloads


def _cost(spec: TuneSpec, trial: TrainSpec, work_s: float, peak_bytes: int, machine: Machine) -> str:
    """Hours of CPUs and GPUs, and the sum where prices are given, of trials that work `work_s` seconds in all."""
    gpus = 0.0  # a share of one, or one for each worker of a distributed trial
    if machine.gpu is not None:
        gpus = trial.num_workers if trial.num_workers > 1 else peak_bytes / (HEADROOM * machine.memory_bytes)
    cpu_h, gpu_h = work_s / 3600 * trial.cpus_per_worker * trial.num_workers, work_s / 3600 * gpus
    hours = f"{cpu_h:.2f} CPU-hours" + (f", {gpu_h:.2f} GPU-hours" if gpu_h else "")
    if spec.prices is None:
        return f"{hours} in all"
    return f"{hours} in all: {cpu_h * spec.prices.cpu_hour + gpu_h * spec.prices.gpu_hour:.3g} at `prices`"


def resolve_auto_trial(
    spec: TuneSpec, trial: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine
) -> TrainSpec:
    """A trial without `auto`, for the share of the memory that it has. Raises ConfigError where nothing fits.

    With `max_concurrent: auto` on CPUs that is the share of as many at a time as the cores allow, or of fewer that fit.
    """
    if machine.gpu is not None:
        return resolve_auto(trial, model, rows, machine).spec
    most = max(1, min(spec.num_trials, int(machine.cores // (trial.cpus_per_worker * trial.num_workers))))
    for at_once in range(most, 1, -1) if spec.max_concurrent == "auto" else (spec.max_concurrent,):
        with contextlib.suppress(ConfigError):
            return resolve_auto(trial, model, rows, replace(machine, memory_bytes=machine.memory_bytes // at_once)).spec
    last = 1 if spec.max_concurrent == "auto" else spec.max_concurrent
    return resolve_auto(trial, model, rows, replace(machine, memory_bytes=machine.memory_bytes // last)).spec


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


def points_to_plan(spec: TuneSpec) -> tuple[Values, ...]:
    """The points that will run where the search knows them; else as many drawn at random, the space's corners first."""
    search = search_of(spec)
    return search.points if isinstance(search, FixedPoints | PbtSearch) else RandomSpec().start(spec).points


MODELLED_FROM = 8
"""Trials from which a search that is not named is TPE: better than random after so many (benchmarks/search.py)."""


def search_of(spec: TuneSpec) -> Search:
    """Return the search of a spec. Raises ConfigError when it can't search this space."""
    if spec.search is not None:
        return spec.search.start(spec)
    size = grid_size(spec.space)
    if size is not None and size <= spec.num_trials:
        return GridSpec().start(spec)
    return (TpeSpec() if spec.num_trials >= MODELLED_FROM else RandomSpec()).start(spec)
