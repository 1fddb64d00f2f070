"""Resume point of a worker: the newest complete checkpoint with intact files, the same on all ranks; resharding."""

import argparse
import contextlib
import functools
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError, RunError, StorageError
from graftwork.storage.store import RunPaths
from graftwork.training.checkpoint import CheckpointMark, Checkpoints
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import (
    TrainJob,
    all_gather_object,
    from_rank_0,
    gather_results,
    rank_and_world,
)

STARTS = "starts.json"


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that a worker resumes from."""

    mark: CheckpointMark
    """Of step 0 where the run begins."""
    folder: Path | None = None
    """The checkpoint's files on this machine."""
    notes: tuple[str, ...] = ()
    sends: bool = True
    """This rank sends the checkpoints of its machine."""
    universal: bool = False
    """`folder` is in DeepSpeed's universal form."""

    def require_loadable(self, spec: TrainSpec) -> None:
        """Raise ConfigError when the strategy can't go on from the checkpoint."""
        asked, mark = spec.strategy.kind, self.mark
        if mark.strategy != asked:
            raise ConfigError(
                f"strategy.kind={asked}",
                f"the checkpoint of step {mark.step} was written by strategy {mark.strategy}",
                "optimizer states are kept in their strategy's form",
                f"--set strategy.kind={mark.strategy}",
            )


def agree_resume_point(job: TrainJob) -> ResumePoint:
    """Collective; clears what killed runs left, brings the checkpoint to each machine, notes the start in starts.json.

    Raises StorageError on all ranks alike.
    """
    run, world = job.run, rank_and_world()[1]
    start = ResumePoint(CheckpointMark(0, 0.0, world, job.spec.strategy.kind))
    if run is None:
        return start
    checkpoints = Checkpoints(run)
    sends = _sends_its_folder(checkpoints)
    if sends:
        checkpoints.clear_cache()
    found = [(checkpoints, mark) for mark in reversed(from_rank_0(checkpoints.clear_unfinished))]
    if job.begin_from is not None:
        before = Checkpoints(job.begin_from)
        found += [(before, mark) for mark in reversed(from_rank_0(before.marks))]
    folder, notes = None, []
    for of, mark in found:
        fetch: Callable[[], list[str]] = functools.partial(of.fetch, mark) if sends else list
        damage = [one for part in gather_results(fetch) for one in part]
        if not damage:
            start, folder = replace(start, mark=mark), of.folder(mark.step)
            break
        notes.append(f"the checkpoint of step {mark.step} is damaged ({damage[0]}) and was left out")
        from_rank_0(functools.partial(of.drop, mark.step))
    if folder is None and job.begin_from is not None:
        raise StorageError(
            f"the checkpoint of {'/'.join(job.begin_from.file())}",
            "; ".join(notes) or "there is none",
            "this run begins from a complete one",
        )
    if start.mark.world_size != world:
        notes.append(
            f"step {start.mark.step} was reached by {start.mark.world_size} workers, {world} go on: the same rows a "
            "step; random numbers (dropout) are drawn again"
        )
    begun = {"at": round(time.time(), 3), "step": start.mark.step, "workers": world, "notes": notes}
    from_rank_0(lambda: run.store.write_json([*read_starts(run), begun], *run.file(STARTS)))
    return replace(start, folder=folder, notes=tuple(notes), sends=sends)


def read_starts(run: RunPaths) -> list[dict[str, object]]:
    """Every time that the run's workers began: when, after which step, how many, with which notes."""
    key = run.file(STARTS)
    found: list[dict[str, object]] = run.store.read_json(*key) if run.store.exists(*key) else []
    return found


def _sends_its_folder(checkpoints: Checkpoints) -> bool:
    """Return True on the first rank of those that share its folder: each machine's files are sent once. Collective."""
    rank, world = rank_and_world()
    if world == 1:
        return True
    token = from_rank_0(lambda: secrets.token_hex(4))
    folder = checkpoints.work_dir()
    own = folder / f".tmp-here-{token}-{rank}"
    own.touch()
    all_gather_object(rank)
    seen = [int(path.name.rpartition("-")[2]) for path in folder.glob(f".tmp-here-{token}-*")]
    all_gather_object(rank)
    own.unlink()
    all_gather_object(rank)  # the folder may be cleared now
    return min(seen) == rank


# DeepSpeed 0.19 loads shards with as many workers as wrote them, and transformers 5.23 never requests the universal
# form: the folder is made here, and `checkpoint.load_universal` in DeepSpeed's configuration makes the engine read it.


def reshaped(start: ResumePoint, spec: TrainSpec, world: int) -> ResumePoint:
    """The start, its shards in a form that `world` workers load where other numbers wrote them. Collective."""
    shards, step = start.folder, start.mark.step
    if shards is None or not spec.strategy.kind.startswith("zero") or start.mark.world_size == world:
        return start
    stage = int(spec.strategy.kind[-1])
    gather_results(lambda: _convert(shards, step, stage) if start.sends else None)
    return replace(start, folder=universal_of(shards), universal=True)


def universal_of(folder: Path) -> Path:
    """Folder of a checkpoint's universal form, under a name that no listing takes for a checkpoint."""
    return folder.with_name(f".tmp-universal-{folder.name}")


def split_optimizer_groups(engine: Any) -> None:
    """Undo what DeepSpeed's ZeRO-3 merges when it loads the universal form. On every rank, once it has loaded.

    DeepSpeed 0.19.8 (zero/stage3.py load_hp_checkpoint_state_from_checkpoint_dir_stage3) gives all groups of parameters
    one and the same `step` tensor, which torch's AdamW then counts up once a group, and the first group's weight decay.
    """
    optimizer = engine.optimizer.optimizer
    for state in optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()
    for group in optimizer.param_groups[1:]:
        group["weight_decay"] = 0.0  # transformers' second group: norms and biases


def _convert(folder: Path, step: int, stage: int) -> None:
    """Write the universal form: the trainer's own files linked, the shards merged. Raises RunError."""
    from deepspeed.checkpoint import ds_to_universal

    whole, name = universal_of(folder), f"global_step{step}"
    shutil.rmtree(whole, ignore_errors=True)
    (whole / name).mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file():
            os.link(file, whole / file.name)
    said = io.StringIO()
    arguments = argparse.Namespace(
        input_folder=str(folder / name),
        output_folder=str(whole / name),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=stage < 3,
    )
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise RunError(
            f"checkpoint of step {step} for another number of workers",
            f"{type(error).__name__}: {error}",
            "DeepSpeed merges the shards into its universal form",
            "go on with as many workers as wrote it",
        ) from error
