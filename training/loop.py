"""Training loop: every run and every tuning trial takes its optimizer steps here, on the rows that `step_plan` deals.

Legend: S steps, R rows a step (all workers), W workers, G forward passes a step on one worker, M rows a pass,
N rows of the set.
"""

import contextlib
import errno
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graftwork.base.load import LoadedBase, ResolvedBase, load, resolve
from graftwork.base.source import BaseSpec
from graftwork.cluster.jobs.fencing import FenceMonitor, SupersededError
from graftwork.environment import peak_rss_bytes
from graftwork.errors import BaseModelError, ConfigError, GraftworkError, StorageError, StoreUnreachable
from graftwork.quantization import import_bitsandbytes
from graftwork.storage.store import cache_root
from graftwork.training import strategies
from graftwork.training.checkpoint import AsyncCheckpointSaver, CheckpointLost, Checkpoints, shapes_of
from graftwork.training.checkpoint_resume import ResumePoint, agree_resume_point, reshaped
from graftwork.training.rewards import BadReward
from graftwork.training.spec import OptimSpec, TrainSpec
from graftwork.training.worker_messages import (
    LoopResult,
    NonFiniteLoss,
    Report,
    StepLog,
    TrainJob,
    all_gather_object,
    before_after,
    gather_results,
    rank_and_world,
)

log = logging.getLogger("graftwork.training")


class DifferentBases(BaseModelError):
    """Workers have other files of the base than each other. Raised on all ranks."""


ON_ALL_RANKS: Final = (
    *(NonFiniteLoss, BadReward, CheckpointLost, SupersededError),
    *(ConfigError, StoreUnreachable, DifferentBases),
)
"""Errors that every worker meets at the same step: returned, since another try would meet them again."""


def train_as_worker(
    job: TrainJob, report: Report | None, preemption_requested: Callable[[], bool]
) -> LoopResult | GraftworkError:
    """Run the loop in this process; return the errors of `ON_ALL_RANKS` and raise all others.

    `report` None: a run, which writes its own records and whose peak corrects later memory plans.
    `preemption_requested` returns True once this process has notice to save and exit; rank 0 adds the attempt's stop
    requests (`job.fence`).
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # PEFT's and TRL's calls of it
    rank = rank_and_world()[0]
    monitor = FenceMonitor(job.fence) if job.fence is not None and rank == 0 else None

    def must_save_and_exit() -> bool:
        return preemption_requested() or (monitor is not None and monitor.stop_reason is not None)

    try:
        result = run_steps(job, report or (lambda _: True), must_save_and_exit)
        if report is None and rank == 0:
            _correct_plans(job, result)
        return result
    except ON_ALL_RANKS as error:
        return error
    finally:
        if monitor is not None:
            monitor.close()


def _correct_plans(job: TrainJob, result: LoopResult) -> None:
    """Correct later memory plans by the run's peak. Log an error of it: the run itself is complete."""
    from graftwork.training.autotune import learn_peak

    try:
        learn_peak(job, result)
    except Exception:
        log.warning("training %s: its memory peak does not correct later plans", job.spec.name, exc_info=True)


def run_steps(job: TrainJob, report: Report, preemption_requested: Callable[[], bool] = lambda: False) -> LoopResult:
    """Train on `job.data`, alone or as one of `torch.distributed`'s ranks if a process group is up.

    Every rank of the group calls it with an equal job. `preemption_requested` is called at each step and returns True
    once this machine is about to be taken away: then all ranks save and return. Raises NonFiniteLoss, CheckpointLost,
    BaseModelError, ConfigError (a checkpoint that the strategy can't load), StorageError (disk full).
    """
    rank, world = rank_and_world()
    plan, start = plan_of(job, world), agree_resume_point(job)
    log = StepLog.resumed(job.run, start.mark.step) if rank == 0 else StepLog(None)
    folder = Checkpoints(job.run).work_dir() if job.run is not None else cache_root() / "trials"
    folder.mkdir(parents=True, exist_ok=True)  # a trial's trainer requires one, and leaves it empty
    try:
        if start.mark.step < plan.steps:
            start.require_loadable(job.spec)
            return _train(job, plan, start, log, report, preemption_requested, folder)
        if job.parts:
            from graftwork.training.evaluation.run import measure_finished

            measure_finished(job, start.mark.step, device_of(job.spec))
        return _result(log, start, plan.steps, start.mark.elapsed_s, start.notes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"checkpoint in {folder}",
            f"no space left ({error})",
            "the last complete checkpoint is untouched",
            "free disk space and run the same command: it continues from there",
        ) from error


def _train(
    job: TrainJob,
    plan: "StepPlan",
    start: ResumePoint,
    log: StepLog,
    report: Report,
    preemption_requested: Callable[[], bool],
    folder: Path,
) -> LoopResult:
    """Load the base, attach the adapter, take the steps that `start` leaves. The slow imports take 5 to 10 s."""
    import torch

    import_bitsandbytes()
    from graftwork.training.callback import StepCallback
    from graftwork.training.evaluation.run import Measuring
    from graftwork.training.objectives.trainer import TrainerContext, build

    spec, world = job.spec, rank_and_world()[1]
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    base, kind = resolve_on_all(spec.base), spec.strategy.kind
    zero3_context = strategies.sharding(spec, plan, world, base) if kind == "zero3" else None
    shards = kind if kind in ("zero3", "fsdp2") else "none"
    loaded = load(base, spec.quant, device=device_of(spec), purpose="train", shards=shards)
    outcomes = Measuring(job, base) if job.parts else None
    if outcomes is not None:
        outcomes.before(loaded.model)
    if spec.strategy.context_parallel > 1:
        job = _with_context_parallel(job, loaded.model)
    model = _with_adapter(job, loaded)
    start = reshaped(start, spec, world)
    saver = None
    with contextlib.ExitStack() as stack:
        if job.run is not None:
            saver = AsyncCheckpointSaver(
                Checkpoints(job.run), spec.checkpoints, shapes_of(model), log, job.fence, sends=start.sends
            )
            stack.callback(saver.close)
        callback = StepCallback(job, plan, log, report, preemption_requested, start, saver)
        built = build(TrainerContext(job, plan, base, model, folder, callback, start.universal))
        del zero3_context  # the trainer has a configuration of its own now
        callback.training, trainer = built, built.trainer
        trainer.train(resume_from_checkpoint=str(start.folder) if start.folder else None)
        if saver is not None:
            saver.wait()
    batches = f"micro_batch={plan.micro_batch}, accumulation={plan.accumulation}"
    notes = (loaded.reason, batches, *built.notes, *strategies.notes(kind, trainer.model, world), *start.notes)
    done, wall_s = trainer.state.global_step, callback.elapsed_s()
    if outcomes is not None and not callback.preempted:
        outcomes.after(trainer.model)
    return _result(log, start, done, wall_s, notes, stopped=callback.stopped, preempted=callback.preempted)


def resolve_on_all(base: BaseSpec) -> ResolvedBase:
    """The base on this machine, with the digest that it has on all ranks: frozen weights are not sent. Collective.

    Raises DifferentBases, and the first error of any rank's `resolve`.
    """
    found = gather_results(lambda: resolve(base))
    ranks: dict[str, list[str]] = {}
    for rank, one in enumerate(found):
        ranks.setdefault(one.digest, []).append(str(rank))
    if len(ranks) > 1:
        raise DifferentBases(
            f"base {base.uri}",
            "; ".join(f"sha256 {digest} on worker {', '.join(some)}" for digest, some in ranks.items()),
            "all workers of a run train the same base, which each reads from its own machine",
            "pin the revision of a Hugging Face id, ORG/NAME@COMMIT; copy the same folder to each machine",
        )
    return found[rank_and_world()[0]]


def _with_context_parallel(job: TrainJob, model: Any) -> TrainJob:
    """The job on this worker's parts of the rows; the model's attention runs over the workers that share them."""
    from graftwork.training.context_parallel import parts_of, use_context_parallel

    size, rank, data = job.spec.strategy.context_parallel, rank_and_world()[0], job.data
    use_context_parallel(model, size)
    held_out = parts_of(data.eval, size, rank) if data.eval is not None else None
    return replace(job, data=replace(data, train=parts_of(data.train, size, rank), eval=held_out))


def plan_of(job: TrainJob, world: int) -> "StepPlan":
    """The rows of every step of a job on `world` workers."""
    repeats = job.spec.objective.traits.steps_per_batch
    replicas = world // job.spec.strategy.context_parallel
    return step_plan(job.data.train.lengths_N, job.spec.optim, job.spec.seed, replicas, job.max_steps, repeats)


def device_of(spec: TrainSpec) -> str:
    """Device that this worker computes on."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if spec.gpus > 0 else "cpu"


def _with_adapter(job: TrainJob, loaded: LoadedBase) -> Any:
    """The base with the spec's adapter: random by the seed, or a published one's weights. A checkpoint comes later."""
    from transformers import set_seed

    from graftwork.training.adapters.attach import attach, attach_frozen_adapter, load_adapter_weights
    from graftwork.training.adapters.merge import require_deltas
    from graftwork.training.objectives.reward_head import add_reward_head
    from graftwork.training.warm_start import adapter_folder, folder_below

    spec = job.spec
    set_seed(spec.seed)
    base = add_reward_head(loaded.model) if spec.objective.traits.reward_head else loaded.model
    if spec.base_adapter is not None:
        attach_frozen_adapter(base, folder_below(spec))
    model = attach(base, spec.adapter, job.data.trained_tokens)
    if spec.base_adapter is not None:  # the published sum of both must be one that PEFT can write
        require_deltas(f"base_adapter={spec.base_adapter}", model.active_peft_config.to_dict())
    if spec.init_from is not None:
        load_adapter_weights(model, adapter_folder(spec))
    return model


def _result(
    log: StepLog,
    start: ResumePoint,
    steps: int,
    wall_s: float,
    notes: tuple[str, ...],
    *,
    stopped: bool = False,
    preempted: bool = False,
) -> LoopResult:
    """Return the run's result so far: its logged steps and the memory peaks of all ranks. Collective."""
    import torch

    own_cuda_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peaks = all_gather_object((peak_rss_bytes(), own_cuda_peak))
    return LoopResult(
        steps=steps,
        stopped=stopped,
        steps_this_attempt=steps - start.mark.step,
        preempted=preempted,
        train_loss=tuple((known.step, known.loss) for known in log.steps),
        eval_loss=tuple((known.step, known.eval_loss) for known in log.steps if known.eval_loss is not None),
        tokens=log.steps[-1].tokens if log.steps else 0,
        wall_s=wall_s,
        peak_rss_bytes_per_worker=tuple(rss for rss, _ in peaks),
        peak_cuda_bytes_per_worker=tuple(cuda for _, cuda in peaks),
        notes=(*notes, *before_after(log.steps)),
    )


@dataclass(frozen=True)
class StepPlan:
    """The rows of every step. A step sees the same rows whatever the number of workers."""

    rows_SR: NDArray[np.int64]
    tokens_S: NDArray[np.int64]
    """Tokens of each step, padding left out."""
    micro_batch: int
    """Rows of a forward pass: the largest divisor of a worker's rows a step that `optim.micro_batch` allows."""
    accumulation: int
    """Forward passes of one worker a step."""
    steps: int
    """Optimizer steps of the run."""


def step_plan(
    lengths_N: NDArray[np.int64], optim: OptimSpec, seed: int, world: int, max_steps: int | None, repeats: int = 1
) -> StepPlan:
    """Order of the rows: one seeded permutation a pass, laid end to end, cut into steps of `rows_per_step`.

    A pure function of lengths and seed, so that any step can be taken again. The last step is filled up from the next
    pass. Within a step rows are sorted by length, so that rows of one forward pass need little padding, and dealt to
    the workers back and forth, so that their loads are near equal.
    repeats: steps in a row on the same rows (`objective.iterations`); a pass takes so many times the steps.
    """
    rows, per_worker = optim.rows_per_step, optim.rows_per_step // world
    micro = max(d for d in range(1, min(optim.rows_per_pass, per_worker) + 1) if per_worker % d == 0)
    steps = max_steps or max(1, math.ceil(optim.epochs * len(lengths_N) / rows - 1e-9)) * repeats
    fresh = math.ceil(steps / repeats)
    passes = math.ceil(fresh * rows / len(lengths_N))
    order = np.concatenate([np.random.default_rng([seed, p]).permutation(len(lengths_N)) for p in range(passes)])
    rows_SR = order[: fresh * rows].reshape(fresh, rows)
    by_length = np.take_along_axis(rows_SR, np.argsort(lengths_N[rows_SR], axis=1, kind="stable"), axis=1)
    # as the data loader deals them: pass 0 of worker 0, of worker 1, ..., pass 1 ...
    dealt_SGWM = by_length.reshape(fresh, -1, world, micro)
    dealt_SGWM[:, 1::2] = dealt_SGWM[:, 1::2, ::-1].copy()
    rows_SR = dealt_SGWM.reshape(rows_SR.shape).repeat(repeats, axis=0)[:steps]
    return StepPlan(rows_SR, lengths_N[rows_SR].sum(axis=1), micro, per_worker // micro, steps)
