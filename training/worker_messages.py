"""Messages between driver and workers: the job, its result, and the steps in metrics.jsonl. Loads no torch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graftwork.cluster.jobs.fencing import Fence
from graftwork.errors import RunError
from graftwork.storage.store import RunPaths
from graftwork.training.evaluation.spec import ItemGroup
from graftwork.training.objectives.rows import PreparedData
from graftwork.training.spec import TrainSpec


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, over all workers."""

    step: int
    total_steps: int
    loss: float
    """Mean over the step's trained tokens, in nats."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens processed since the run's first step, padding left out."""
    elapsed_s: float
    """Seconds since the run's first step, resumed parts included, loading left out."""
    step_s: float
    """Seconds of this step: forward, backward and update, waiting for the slowest worker included."""
    eval_loss: float | None = None
    """Mean over the held-out rows' trained tokens, where this step was evaluated."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The kind's own figures (rewards, margins, accuracies); those of held-out rows begin with `eval_`."""


@dataclass
class StepLog:
    """The steps of a run so far. `run=None` keeps them in memory only (a tuning trial)."""

    run: RunPaths | None
    steps: list[StepReport] = field(default_factory=list)

    @classmethod
    def resumed(cls, run: RunPaths | None, step: int) -> "StepLog":
        """The log up to a checkpoint's step; later lines came from steps that are taken again. Rewrites the file."""
        if run is None or not run.store.exists(*run.metrics()):
            return cls(run)
        log = cls(run, [known for known in read_steps(run) if known.step <= step])
        log.flush(step)
        return log

    def add(self, report: StepReport) -> None:
        """Note a step; on a local root it is on disk at once."""
        self.steps.append(report)
        if self.run is not None and self.run.store.is_local:
            self.run.store.append_jsonl(_line(report), *self.run.metrics())

    def flush(self, step: int) -> None:
        """Write the whole file up to a step: objects on S3 cannot grow, so there it is done at each checkpoint."""
        if self.run is not None:
            lines = "".join(json.dumps(_line(report)) + "\n" for report in list(self.steps) if report.step <= step)
            self.run.store.write_bytes(lines.encode(), *self.run.metrics())


def read_steps(run: RunPaths) -> list[StepReport]:
    """Steps noted so far. A last line that a killed writer left half is skipped."""
    text = run.store.read_text(*run.metrics()) if run.store.exists(*run.metrics()) else ""
    return [StepReport(**record) for line in text.splitlines() if (record := _parsed(line)) is not None]


def _line(report: StepReport) -> Mapping[str, object]:
    return {key: value for key, value in asdict(report).items() if value is not None and value != {}}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record


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
