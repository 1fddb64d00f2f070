"""ZeRO checkpoints for another number of workers, by way of DeepSpeed's universal form.

DeepSpeed 0.19 loads shards with as many workers as wrote them, and transformers 5.23 never asks for the universal form:
the folder is made here, and `checkpoint.load_universal` in DeepSpeed's configuration makes the engine read it.
"""

import argparse
import contextlib
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwork.errors import GraftworkError, RunError
from graftwork.training.checkpoint_start import ResumePoint
from graftwork.training.ranks import all_gather_object, attempt
from graftwork.training.spec import TrainSpec


def reshaped(start: ResumePoint, spec: TrainSpec, world: int) -> ResumePoint:
    """The start, its shards in a form that `world` workers load where other numbers wrote them. Collective."""
    mark = start.mark
    if mark is None or start.folder is None or not spec.strategy.kind.startswith("zero") or mark.world_size == world:
        return start
    shards, whole = start.folder, universal_of(start.folder)
    stage = int(spec.strategy.kind[-1])
    for outcome in all_gather_object(attempt(lambda: _convert(shards, mark.step, stage) if start.sends else None)):
        if isinstance(outcome, GraftworkError):
            raise outcome
    return replace(start, folder=whole, universal=True)


def universal_of(folder: Path) -> Path:
    """Where a checkpoint's universal form is made: beside it, under a name that no listing takes for a checkpoint."""
    return folder.with_name(f".tmp-universal-{folder.name}")


def mend(engine: Any) -> None:
    """Part what DeepSpeed's ZeRO-3 lays together when it loads the universal form. On every rank, once it has loaded.

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
        input_folder=str(folder / name), output_folder=str(whole / name), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=stage < 3,
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise RunError(
            f"checkpoint of step {step} for another number of workers", f"{type(error).__name__}: {error}",
            "DeepSpeed merges the shards into its universal form", "go on with as many workers as wrote it",
        ) from error  # fmt: skip
