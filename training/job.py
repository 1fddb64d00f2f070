"""What a worker is told, and what it tells: plain records without torch, shared by `train` and the tuning trials."""

from collections.abc import Callable
from dataclasses import dataclass

from graftwork.cluster.fence import Fence
from graftwork.errors import RunError
from graftwork.storage import RunPaths
from graftwork.training.data import PreparedData
from graftwork.training.outcomes.parts import ItemGroup
from graftwork.training.spec import TrainSpec
from graftwork.training.steplog import StepReport

Report = Callable[[StepReport], bool]
"""Called on rank 0 only. True goes on; False asks all workers to stop after this step."""


class NonFiniteLoss(RunError):
    """The loss became NaN or infinite. Raised on all ranks at the same step."""


@dataclass(frozen=True)
class TrainJob:
    """What one worker is to do. Picklable; equal on all workers of a run."""

    spec: TrainSpec
    data: PreparedData
    """Tokenised rows from `training.data.prepare`; trials that share their data share this object."""
    run: RunPaths | None = None
    """Where checkpoints and metrics go and where the loop continues from; None (a trial) writes and resumes nothing."""
    begin_from: RunPaths | None = None
    """A run that this one begins from the newest checkpoint of, as long as it has none of its own."""
    max_steps: int | None = None
    """End, learning-rate schedule included, after so many optimizer steps; None takes `spec.optim.epochs`."""
    report_every: int = 1
    """Optimizer steps between calls of `report`; each evaluated step is reported as well."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; None takes `spec.eval_every`. The last step is always evaluated."""
    parts: tuple[ItemGroup, ...] = ()
    """Outcomes that are still to be measured, before and after."""
    fence: Fence | None = None
    """The attempt of a submitted job that this is, which may be overtaken or asked to end. Set by the command that
    drives the workers: they do not inherit its environment."""


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
    """Seconds since the first step, evaluations and checkpoints and resumed parts included, loading left out."""
    peak_rss_bytes_per_worker: tuple[int, ...]
    """Largest resident set of each rank's process."""
    peak_cuda_bytes_per_worker: tuple[int, ...]
    """Most memory that torch held on each rank's GPU; zeros on a CPU."""
    left: bool = False
    """A machine was about to be taken away: this is the checkpoint before it, not the end."""
    notes: tuple[str, ...] = ()
    """What the loop resolved, with the reason."""
