"""THE loop: every training run and every tuning trial takes its optimizer steps here."""

from collections.abc import Callable
from dataclasses import dataclass

from graftwork.storage import RunPaths
from graftwork.training.data import PreparedData
from graftwork.training.spec import TrainSpec


@dataclass(frozen=True)
class TrainJob:
    """What one worker is to do. Picklable; equal on all workers of a run."""

    spec: TrainSpec
    data: PreparedData
    """Tokenised rows from `training.data.prepare`; trials that share their data share this object."""
    run: RunPaths | None = None
    """Where checkpoints and metrics go and where the loop continues from; None (a trial) writes and resumes nothing."""
    max_steps: int | None = None
    """End, learning-rate schedule included, after so many optimizer steps; None takes `spec.optim.epochs`."""
    report_every: int = 1
    """Optimizer steps between calls of `report`; each evaluated step is reported as well."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; None takes `spec.eval_every`. The last step is always evaluated."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, over all workers."""

    step: int
    total_steps: int
    loss: float
    """Mean over the step's trained tokens, in nats."""
    lr: float
    grad_norm: float
    tokens: int
    """Tokens processed since the run's first step, padding left out."""
    elapsed_s: float
    """Seconds in optimizer steps since the run's first step, resumed parts included."""
    eval_loss: float | None = None
    """Mean over the held-out rows' trained tokens, where this step was evaluated."""


@dataclass(frozen=True)
class LoopResult:
    """How the loop ended on this worker."""

    steps: int
    stopped: bool
    """`report` asked to stop before the last step."""
    train_loss: tuple[tuple[int, float], ...]
    eval_loss: tuple[tuple[int, float], ...]
    tokens: int
    wall_s: float
    """Seconds in optimizer steps and evaluations, resumed parts included; loading the base is left out."""
    peak_rss_bytes: int
    """Largest resident set of this worker's process."""
    peak_cuda_bytes: int


Report = Callable[[StepReport], bool]
"""Called on rank 0 only. True goes on; False asks all workers to stop after this step."""


def run_steps(job: TrainJob, report: Report) -> LoopResult:
    """Train on `job.data`, alone or as one of `torch.distributed`'s ranks if a process group is up.

    Every rank of the group calls it with an equal job. Raises RunError when the loss is not finite, DataError when no
    row is left to train on.
    """
    raise NotImplementedError
