"""Training loop: every run and every tuning trial takes its optimizer steps here."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.base import load as base_model
from graftwork.environment import peak_rss_bytes
from graftwork.errors import StorageError
from graftwork.quantization import import_bitsandbytes
from graftwork.storage.store import cache_root
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.checkpoint_resume import ResumePoint, agree_resume_point
from graftwork.training.distributed import rank_and_world
from graftwork.training.evaluation.run import before_after
from graftwork.training.spec import TrainSpec
from graftwork.training.step_plan import StepPlan, step_plan
from graftwork.training.warm_start import adapter_folder, folder_below
from graftwork.training.worker_messages import LoopResult, Report, StepLog, TrainJob

if TYPE_CHECKING:
    from graftwork.training.checkpoint import Saver


def run_steps(job: TrainJob, report: Report, leaving: Callable[[], bool] = lambda: False) -> LoopResult:
    """Train on `job.data`, alone or as one of `torch.distributed`'s ranks if a process group is up.

    Every rank of the group calls it with an equal job. `leaving` is asked at each step whether this machine is about to
    be taken away: then all ranks save and return. Raises NonFiniteLoss, CheckpointLost, BaseModelError, ConfigError
    (a checkpoint that the strategy can't load), StorageError (disk full).
    """
    spec, (rank, world) = job.spec, rank_and_world()
    plan, start = plan_of(job, world), agree_resume_point(job)
    log = StepLog.resumed(job.run, start.step) if rank == 0 else StepLog(None)
    folder = _work_dir(job)
    with _disk_full_explained(folder):
        if start.step >= plan.steps:
            if job.parts:
                from graftwork.training.evaluation.run import measure_finished

                measure_finished(job, start.step, device_of(spec), rank, world)
            return _result(log, plan.steps, start.elapsed_s, stopped=False, notes=start.notes)
        start.require_loadable(spec)
        import torch

        import_bitsandbytes()
        from graftwork.training import strategies
        from graftwork.training.callback import StepCallback
        from graftwork.training.checkpoint_resume import reshaped
        from graftwork.training.evaluation.run import Measuring
        from graftwork.training.objectives.trainer import (
            TrainerContext,
            build,  # the slow imports of a worker: 5 to 10 s
        )
        from graftwork.training.strategies import layout, sharding

        torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
        base = base_model.resolve(spec.base)
        holding = sharding(spec, plan, world, base)
        loaded = base_model.load(base, spec.quant, device=device_of(spec), purpose="train", shards=layout(spec))
        outcomes = Measuring(job, base, rank, world)
        outcomes.before(loaded.model)
        model = _with_adapter(job, loaded)
        start = reshaped(start, spec, world)
        with _saver(job, model, log, start) as saver:
            watch = StepCallback(job, plan, log, report, leaving, start, saver)
            training = build(TrainerContext(job, plan, base, model, folder, watch, start.universal))
            del holding  # the trainer has a configuration of its own now
            watch.training, trainer = training, training.trainer
            trainer.train(resume_from_checkpoint=str(start.folder) if start.folder else None)
        batches = f"micro_batch={plan.micro_batch}, accumulation={plan.accumulation}"
        shared = strategies.notes(spec.strategy.kind, trainer.model, world)
        notes = (loaded.reason, batches, *training.notes, *shared, *start.notes)
        done, wall_s = trainer.state.global_step, watch.elapsed_s()
        if not watch.left:
            outcomes.after(trainer.model)
        return _result(log, done, wall_s, stopped=watch.stopped, left=watch.left, notes=notes)  # its peaks: of all that


@contextmanager
def _saver(job: TrainJob, model: Any, log: StepLog, start: ResumePoint) -> "Iterator[Saver | None]":
    """What makes checkpoints whole beside the training; at the block's end all of them are, or tried. Collective."""
    from graftwork.training.checkpoint import Saver, shapes_of

    if job.run is None:
        yield None
        return
    saver = Saver(Checkpoints(job.run), job.spec.checkpoints, shapes_of(model), log, job.fence, sends=start.sends)
    try:
        yield saver
        saver.wait()
    finally:
        saver.close()


def plan_of(job: TrainJob, world: int) -> StepPlan:
    """The rows of every step of a job on `world` workers."""
    repeats = job.spec.objective.traits.steps_per_batch
    return step_plan(job.data.train.lengths_N, job.spec.optim, job.spec.seed, world, job.max_steps, repeats)


def _with_adapter(job: TrainJob, loaded: base_model.LoadedBase) -> Any:
    """The base with the spec's adapter: random by the seed, or a published one's weights. A checkpoint comes later."""
    from transformers import set_seed

    from graftwork.training.adapters.attach import attach, attach_frozen_adapter, load_adapter_weights
    from graftwork.training.objectives.reward_head import add_reward_head

    spec = job.spec
    set_seed(spec.seed)
    base = add_reward_head(loaded.model) if spec.objective.traits.reward_head else loaded.model
    if spec.base_adapter is not None:
        attach_frozen_adapter(base, folder_below(spec))
    model = attach(base, spec.adapter, job.data.trained_tokens)
    if spec.init_from is not None:
        load_adapter_weights(model, adapter_folder(spec))
    return model


def device_of(spec: TrainSpec) -> str:
    """Where this worker computes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if spec.gpus > 0 else "cpu"


def _work_dir(job: TrainJob) -> Path:
    """Where the trainer writes: the run's checkpoint folder; for a trial one that it wants to have and leaves empty."""
    if job.run is not None:
        return Checkpoints(job.run).work_dir()
    folder = cache_root() / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _disk_full_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"checkpoint in {folder}",
            f"no space left ({error})",
            "the last whole checkpoint is untouched",
            "free disk space and run the same command: it continues from there",
        ) from error


def _result(
    log: StepLog, steps: int, wall_s: float, *, stopped: bool, left: bool = False, notes: tuple[str, ...]
) -> LoopResult:
    """Collective: every rank adds its memory peaks."""
    import torch
    import torch.distributed as dist

    peak = peak_rss_bytes()
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peaks: list[tuple[int, int]] = [(peak, cuda)]
    if rank_and_world()[1] > 1:
        peaks = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(peaks, (peak, cuda))
    return LoopResult(
        steps=steps,
        stopped=stopped,
        left=left,
        train_loss=tuple((known.step, known.loss) for known in log.steps),
        eval_loss=tuple((known.step, known.eval_loss) for known in log.steps if known.eval_loss is not None),
        tokens=log.steps[-1].tokens if log.steps else 0,
        wall_s=wall_s,
        peak_rss_bytes_per_worker=tuple(rss for rss, _ in peaks),
        peak_cuda_bytes_per_worker=tuple(cuda for _, cuda in peaks),
        notes=(*notes, *before_after(log.steps)),
    )
