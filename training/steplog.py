"""metrics.jsonl of a run: one line a step, in step with the checkpoint that a run continues from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graftwork.storage import RunPaths


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
