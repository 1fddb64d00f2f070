"""Messages of a run: job, result, steps in metrics.jsonl; and the collective calls of its workers. Loads no torch."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from graftwork.cluster.jobs.fencing import Fence
from graftwork.errors import GraftworkError, RunError, StorageError
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
    steps = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            steps.append(StepReport(**json.loads(line)))
    return steps


def _line(report: StepReport) -> Mapping[str, object]:
    return {key: value for key, value in asdict(report).items() if value is not None and value != {}}


_GROUP = re.compile(r"(?P<name>\w+)\[(?P<row>[^,]*)(, (?P<cell>.*))?\]")
"""A figure of a group of rows: `exact_match[length=512, depth=50]`."""


def before_after(steps: Sequence[StepReport]) -> tuple[str, ...]:
    """A line for each figure that the first step notes as `before_NAME` and the last as `eval_NAME`.

    Groups of rows make a table: a line for each value of their first field.
    """
    if not steps:
        return ()
    before = {
        key.removeprefix("before_"): value for key, value in steps[0].metrics.items() if key.startswith("before_")
    }
    after = {key.removeprefix("eval_"): value for key, value in steps[-1].metrics.items() if key.startswith("eval_")}
    if steps[-1].eval_loss is not None:
        after["loss"] = steps[-1].eval_loss
    lines: list[str] = []
    rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key in (key for key in before if key in after):
        if found := _GROUP.fullmatch(key):
            change = f"{before[key]:.2g} to {after[key]:.2g}"
            rows.setdefault((found["name"], found["row"]), []).append((found["cell"] or "", change))
        else:
            lines.append(f"held-out {key.replace('_', ' ')}: {before[key]:.4g} before, {after[key]:.4g} after")
    for name, row in sorted(rows, key=lambda key: _natural_key(" ".join(key))):
        cells = sorted(rows[name, row], key=lambda pair: _natural_key(pair[0]))
        table = ", ".join(f"{cell} {change}".strip() for cell, change in cells)
        lines.append(f"held-out {name.replace('_', ' ')}, {row}: {table}")
    return tuple(lines)


def _natural_key(text: str) -> list[tuple[int, str]]:
    """Sorts 512 before 1024."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


Report = Callable[[StepReport], bool]
"""Called on rank 0 only. True goes on; False asks all workers to stop after this step."""


class NonFiniteLoss(RunError):
    """The loss became NaN or infinite. Raised on all ranks at the same step."""


@dataclass(frozen=True)
class TrainJob:
    """Work of one worker. Picklable; equal on all workers of a run."""

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
    """Outcome of the loop on this worker."""

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
    steps_this_attempt: int = 0
    """Optimizer steps that this attempt took, those before its resume point left out."""
    preempted: bool = False
    """The workers saved and exited early: a machine was about to be taken away, or the job was asked to end."""
    notes: tuple[str, ...] = ()
    """Values that the loop resolved, with the reason."""


T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process' number and how many there are; (0, 1) without a process group."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_gather_object(value: T, group: Any = None) -> list[T]:
    """The value of every rank, in order. Collective."""
    import torch.distributed as dist

    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values


def gather_results(call: Callable[[], T], group: Any = None) -> list[T]:
    """The result of `call` on every rank, in order. Collective; the first rank's error is raised on all ranks.

    An error that is no GraftworkError is raised as StorageError (an OSError) or RunError; on its own rank the original
    is the cause. Without this the other ranks would wait for the group's timeout.
    """
    rank = rank_and_world()[0]
    outcome: T | GraftworkError
    try:
        outcome = call()
    except GraftworkError as error:
        outcome = error
    except OSError as error:
        outcome = StorageError("the local copy", str(error))
        outcome.__cause__ = error
    except Exception as error:
        outcome = RunError(f"worker {rank}", f"{type(error).__name__}: {error}")
        outcome.__cause__ = error
    outcomes = all_gather_object(outcome, group)
    outcomes[rank] = outcome  # the copy of this rank has lost its cause
    for found in outcomes:
        if isinstance(found, GraftworkError):
            raise found
    return [found for found in outcomes if not isinstance(found, GraftworkError)]


def from_rank_0(call: Callable[[], T]) -> T:
    """The result of `call` on rank 0, on every rank; its error is raised on every rank. Collective."""
    is_first = rank_and_world()[0] == 0
    found: T = gather_results(lambda: call() if is_first else None)[0]  # type: ignore[assignment]  # rank 0 has called it
    return found
