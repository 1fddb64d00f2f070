"""Which checkpoints are kept, and what a run puts up with before it ends. No part of a run's identity."""

from typing import TYPE_CHECKING

from pydantic import Field

from graftwork.config import Spec

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec


class CheckpointSpec(Spec):
    """What becomes of the checkpoints that `checkpoint_every` makes."""

    keep_last: int = Field(default=2, ge=1)
    """Newest whole checkpoints kept; one would do, the second is for the disk that lies."""
    keep_best: int = Field(default=0, ge=0)
    """Checkpoints kept besides, by `metric`."""
    metric: str = "eval_loss"
    """`loss`, `eval_loss` or a figure that the objective logs."""
    higher_is_better: bool = False
    outage_s: float = Field(default=900.0, ge=0)
    """Seconds that storage may be out of reach: shorter only delays, longer ends the run."""


class RecoverySpec(Spec):
    """What happens when a machine is lost."""

    min_workers: int | None = Field(default=None, ge=1)
    """Go on with as few as these; null always waits for `num_workers`."""
    wait_s: float = Field(default=30.0, gt=0)
    """Seconds that a lost machine has to come back before the run goes on with fewer workers."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Seconds without enough machines after which the run ends."""


def refusal(spec: "TrainSpec") -> str | None:
    """Why these fields cannot take effect together."""
    kept, least = spec.checkpoints, spec.recovery.min_workers
    if kept.keep_best and kept.metric.startswith("eval_"):
        if spec.data.eval is None:
            return f"checkpoints.metric={kept.metric} needs held-out rows, and data.eval is not given"
        if spec.checkpoint_every % spec.eval_every:
            return (
                f"checkpoint_every={spec.checkpoint_every} must be a multiple of eval_every={spec.eval_every}, "
                f"so that each checkpoint has the {kept.metric} that keep_best={kept.keep_best} asks for"
            )
    if not kept.keep_best and (kept.metric != "eval_loss" or kept.higher_is_better):
        return "checkpoints.metric takes effect with checkpoints.keep_best alone"
    if least is not None and least > spec.num_workers:
        return f"recovery.min_workers={least} is more than num_workers={spec.num_workers}"
    return None


def world_sizes(spec: "TrainSpec") -> list[int]:
    """Numbers of workers that a run may go on with, largest first: each gets the same number of rows a step."""
    least = spec.recovery.min_workers or spec.num_workers
    return [n for n in range(spec.num_workers, least - 1, -1) if spec.optim.rows_per_step % n == 0]
