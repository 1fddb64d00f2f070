"""Failures of trials and their retries: pure functions of the error and the record."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import exceptions

from graftwork.errors import GraftworkError, RunError
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import NonFiniteLoss
from graftwork.tuning.trials import FailureKind, TrialRecord

ALIKE = 3
"""First trials that fail with the same error before the sweep ends with it."""
_OUT_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "CUDA out of memory", "node running low on memory")
"""torch's allocators (GPU, CPU), bitsandbytes through them, Ray's memory monitor (2.60)."""
_LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.LocalRayletDiedError,
    exceptions.ActorPlacementGroupRemoved,
    exceptions.ActorUnschedulableError,
)
_LOST_WORDS = ("NodeDied", "ActorDied", "The actor died", "node which was hosting", "placement group is removed")
"""Of errors that Tune keeps as text alone."""


@dataclass(frozen=True)
class TrialFailure:
    """Kind of a failure, and its message."""

    kind: FailureKind
    message: str


def failure_of(error: BaseException | str, kernel_kills: int = 0) -> TrialFailure:
    """Classify an error, or the text of one.

    kernel_kills: processes that this machine's kernel killed for memory since the trial began; a worker killed so looks
    like any other lost one.
    """
    cause = getattr(error, "cause", None) or error
    text = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, NonFiniteLoss):
        return TrialFailure("diverged", message_of(error))
    if isinstance(cause, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return TrialFailure("memory", message_of(error))
    lost = isinstance(cause, _LOST) or (isinstance(cause, str) and any(words in cause for words in _LOST_WORDS))
    if lost and kernel_kills:
        return TrialFailure("memory", "its process was killed by the kernel, which had run out of memory")
    return TrialFailure("lost" if lost else "error", message_of(error))


def message_of(error: BaseException | str) -> str:
    """Return one line: the first of our own errors, the reason of a dead actor, the last of any other."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    if isinstance(cause, GraftworkError):
        return lines[0]
    if isinstance(cause, exceptions.RayActorError):
        return next((line for line in lines if " because " in line), lines[0])
    return lines[-1]


def after(
    record: TrialRecord, failure: TrialFailure, spec: TrainSpec, retries: int, *, smaller: bool
) -> dict[str, Any]:
    """Return the changes of a failed trial's record: it is pending again, or failed permanently.

    spec: its training spec without `auto`. smaller: a trial that ran out of memory may run with less.
    """
    gave_up: dict[str, Any] = {"state": "failed", "error": failure.message, "failure": failure.kind}
    if failure.kind not in ("memory", "lost") or record.retried >= retries:
        return gave_up
    times = record.smaller + (failure.kind == "memory")
    if failure.kind == "memory" and (not smaller or shrunk(spec, 1) is None):
        return gave_up
    what = "ran out of memory" if failure.kind == "memory" else "its process or machine was lost"
    then = ""
    if failure.kind == "memory" and (now := shrunk(spec, 1)) is not None:
        rows = f"micro_batch={now.optim.micro_batch} instead of {_rows_per_pass(spec)}"
        again_too = now.optim.gradient_checkpointing != spec.optim.gradient_checkpointing
        then = f" with {'gradient checkpointing' if again_too else rows}"
    note = f"{what} after step {record.steps} ({failure.message[:200]}); run again{then}"
    again = {"retried": record.retried + 1, "attempts": record.attempts + 1, "smaller": times}
    return {"state": "pending", "notes": (*record.notes, note), **again}


def shrunk(spec: TrainSpec, times: int) -> TrainSpec | None:
    """Return the same training in less memory, `times` steps down: half the rows a forward pass, then checkpointing.

    Losses change by rounding alone. None when there is no such step left.
    """
    for _ in range(times):
        rows, optim = _rows_per_pass(spec), spec.optim
        if rows > 1:
            spec = spec.with_({"optim.micro_batch": max(d for d in _divisors(optim.rows_per_step) if d <= rows // 2)})
        elif not optim.gradient_checkpointing:
            spec = spec.with_({"optim.gradient_checkpointing": True})
        else:
            return None
    return spec


def hopeless(trials: Sequence[TrialRecord]) -> RunError | None:
    """Return the error that ends a sweep whose first trials all failed alike before any reported a loss."""
    failed = [trial for trial in trials if trial.state == "failed" and trial.failure in ("error", "memory")]
    alike = {re.sub(r"\b(?=\w*\d)\w+\b", "#", trial.error or "") for trial in failed}  # without numbers and ids
    if len(failed) < ALIKE or len(alike) > 1 or any(trial.losses for trial in trials):
        return None
    return RunError(
        f"a sweep of {len(trials)} trials so far",
        f"the first {len(failed)} failed alike: {failed[0].error}",
        f"a sweep ends when its first {ALIKE} trials fail with the same error",
        "correct the cause in that error and run the same command: failed trials run again",
    )


def kernel_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Return the processes that the kernel killed for memory since it started; 0 where it does not count them."""
    if not vmstat.exists():
        return 0
    found = re.search(r"^oom_kill (\d+)$", vmstat.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) if found else 0


def _rows_per_pass(spec: TrainSpec) -> int:
    return max(d for d in _divisors(spec.optim.rows_per_step) if d <= spec.optim.rows_per_pass)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
