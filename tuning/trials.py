"""Records of a sweep: one per trial, its progress with the predicted time left (ETA), and the report at its end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, stdev
from typing import Any, Literal, Self

from pydantic import JsonValue, TypeAdapter

from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.errors import BaseModelError
from graftwork.planning.hardware import FP32
from graftwork.training.report import Progress, TrainReport
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport
from graftwork.tuning.search_space import EVAL_LOSS, Goal


class Costs:
    """Costs of one trial for `TrialRecord.metrics`, counted in its process: seconds are a mean over all steps."""

    def __init__(self, trial: TrainSpec) -> None:
        try:
            self._known = size_of(trial)
        except BaseModelError:  # a sweep with a size as objective is rejected before it starts (tuning.run)
            self._known = {}
        self._steps, self._step_s, self._tokens = 0, 0.0, 0

    def add(self, report: StepReport) -> None:
        """Count an optimizer step."""
        self._steps += 1
        self._step_s += report.step_s
        self._tokens = report.tokens

    def metrics(self) -> dict[str, float]:
        """By the names of `goal_spec.METRICS`."""
        return {**self._known, "tokens": float(self._tokens), "step_s": self._step_s / max(1, self._steps)}


def size_of(trial: TrainSpec) -> dict[str, float]:
    """Sizes of a trial's adapter as published, in fp32. Reads the base's config.json.

    Raises BaseModelError for an architecture whose layers are not known (`model_shape`).
    """
    count = trial.adapter.trained_params(ModelShape.from_config(base_model.resolve(trial.base).config))
    return {"trained_parameters": float(count), "adapter_bytes": float(count * FP32)}


State = Literal["pending", "running", "finished", "stopped", "failed"]
"""finished: reached its last step. stopped: by the scheduler. failed: an error, or a loss that is not finite."""
FailureKind = Literal["diverged", "memory", "lost", "error"]
"""diverged: a loss is not finite. memory: it ran out. lost: process or machine. error: anything else."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial. `trial_id` is the digest of its values."""

    trial_id: str
    values: dict[str, JsonValue]
    losses: tuple[tuple[int, float], ...] = ()
    """(optimizer step, held-out loss in nats per trained token) at each report."""
    state: State = "pending"
    steps: int = 0
    """Optimizer steps of the last report."""
    wall_s: float = 0.0
    """From the start of its work, loading the base included, the start of its process left out."""
    peak_rss_bytes: int = 0
    """Largest resident set of its process, as of its last report."""
    error: str | None = None
    failure: FailureKind | None = None
    """What kind of error it failed with."""
    started_s: float = 0.0
    """When its process was asked for, in seconds of the sweep's `wall_s`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What else its last report measured, by name (`trained_parameters`, `adapter_bytes`, `tokens`, `step_s`, ...)."""
    attempts: int = 1
    """Times that it was started."""
    retried: int = 0
    """Of these, times that it was started again because it had failed."""
    smaller: int = 0
    """Steps down in memory that it takes, after memory ran out (`failures.shrunk`)."""
    notes: tuple[str, ...] = ()
    """What happened to it: a machine that was lost, a smaller setting after memory ran out, why it was stopped."""
    repeat_of: str | None = None
    """The trial of the search that this one repeats with another seed (finals)."""
    parent: str | None = None
    """The trial whose checkpoint this one began from (population based training)."""
    until: int | None = None
    """Optimizer step that it ends at; null: the sweep's last."""

    @property
    def ended(self) -> bool:
        """Finished or stopped: a rerun of the sweep does not repeat it."""
        return self.state in ("finished", "stopped")

    @property
    def hopeless(self) -> bool:
        """It would fail again: its loss was not finite."""
        return self.state == "failed" and self.failure == "diverged"

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Back from JSON. Raises ValueError naming the field that is not as it was written."""
        unknown = sorted(tree.keys() - {known.name for known in fields(cls)})
        if unknown:
            raise ValueError(f"{unknown[0]} is no field of a trial")
        record: Self = TypeAdapter(cls).validate_python(dict(tree))
        steps = [step for step, _ in record.losses]
        if steps != sorted(set(steps)):
            raise ValueError(f"losses of trial {record.trial_id} must be in the order of their steps, found {steps}")
        return record


@dataclass(frozen=True)
class TuneProgress:
    """The sweep as it stands, after each change of a trial."""

    trials: tuple[TrialRecord, ...]
    """Those that were chosen so far."""
    total: int
    """Trials in all, at most."""
    elapsed_s: float
    steps: int = 0
    """Optimizer steps of a trial that is not stopped."""
    at_once: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    """Of one trial."""
    trouble: str = ""
    """What the sweep waits out, such as storage that is out of reach."""
    winner: Progress | None = None
    """Of the winner's training, once that goes on."""

    @property
    def done(self) -> int:
        """Trials that finished, were stopped, or failed."""
        return sum(trial.ended or trial.state == "failed" for trial in self.trials)

    @property
    def text(self) -> str:
        """The lowest loss at the furthest step, in a few words."""
        if self.trouble:
            return self.trouble
        if self.winner:
            return f"winner: step {self.winner.step} of {self.winner.total_steps}, loss {self.winner.loss:.3f}"
        seen = [trial for trial in self.trials if trial.losses and trial.state != "failed"]
        if not seen:
            return f"{sum(trial.state == 'running' for trial in self.trials)} running"
        best = min(seen, key=lambda trial: (-trial.steps, trial.losses[-1][1]))
        return f"best so far {best.losses[-1][1]:.3f} at step {best.steps} ({label_points([best.values])[0]})"


LEAST_ENDED = 3
"""Trials that must have ended before their steps say what the others will take."""


@dataclass(frozen=True)
class Pace:
    """Remaining time and cost of a sweep at its pace so far."""

    left_s: float | None
    """None before the first report."""
    low_s: float | None = None
    high_s: float | None = None
    """Two standard errors of the mean steps of a trial; None where `left_s` takes every trial to its last step."""
    ended: int = 0
    """Trials behind the expected steps of the others."""
    device_s: float = 0.0
    """Of all trials so far: core seconds, of GPUs where trials have some."""
    device_total_s: float | None = None


def pace(progress: TuneProgress) -> Pace:
    """Steps that are left over steps taken a second, starts of processes included.

    A trial that is to come takes as many steps as those that ended took on average, early stops included; before three
    have ended every step is counted, so that the time is one at most.
    """
    reached = {trial.trial_id: trial.steps for trial in progress.trials}
    begun = {trial.trial_id: reached.get(trial.parent, 0) if trial.parent else 0 for trial in progress.trials}
    own = {trial_id: max(steps - begun[trial_id], 0) for trial_id, steps in reached.items()}
    taken = sum(own.values())
    each = progress.gpus or progress.cpus
    device_s = each * sum(took_s(trial, progress.elapsed_s) for trial in progress.trials)
    ended = [own[trial.trial_id] for trial in progress.trials if trial.ended]
    if not taken or not progress.elapsed_s:
        return Pace(None, ended=len(ended), device_s=device_s)
    known = len(ended) >= LEAST_ENDED
    expected = fmean(ended) if known else float(progress.steps)
    error = stdev(ended) / math.sqrt(len(ended)) if known else 0.0

    few, many = max(expected - 2 * error, 0.0), min(expected + 2 * error, progress.steps)
    shares = [_remaining_steps(progress, own, steps) / taken for steps in (expected, few, many)]
    left, low, high = (share * progress.elapsed_s for share in shares)
    return Pace(left, low if known else None, high if known else None, len(ended), device_s, device_s * (1 + shares[0]))


def took_s(trial: TrialRecord, now_s: float) -> float:
    """Seconds of a trial on the sweep's clock: `wall_s` of one that runs is that of its last report."""
    return max(now_s - trial.started_s, 0.0) if trial.state == "running" and trial.started_s else trial.wall_s


def _remaining_steps(progress: TuneProgress, own: Mapping[str, int], expected: float) -> float:
    """Steps that remain when a trial takes `expected`; the last trials leave the resources of the others idle."""
    running = [max(expected - own[trial.trial_id], 0.0) for trial in progress.trials if trial.state == "running"]
    begun = sum(trial.state != "pending" for trial in progress.trials)
    to_come = max(progress.total - begun, 0)
    longest = expected if to_come else max(running, default=0.0)
    return max(sum(running) + to_come * expected, longest * min(progress.at_once, max(begun, 1)))


@dataclass(frozen=True)
class FinalistComparison:
    """The best of the finals against another finalist, paired by seed."""

    other_id: str
    difference: float
    """Mean held-out loss of the other minus that of the best, in nats."""
    low: float
    high: float
    """Interval of the difference at 1 - alpha (Student's t)."""
    p_value: float
    """Adjusted for all pairs of finalists (Holm)."""
    seeds: int
    beaten: bool
    """The adjusted p is below alpha."""

    @property
    def tied(self) -> bool:
        """The interval holds 0. One that is neither beaten nor tied differs in this pair only."""
        return self.low <= 0


@dataclass(frozen=True)
class SearchDecision:
    """The trial that was taken, and how sure it is that it is the best."""

    trial_id: str
    best_id: str
    """The one with the lowest loss, over all seeds in finals: another one may be tied with it, and cheaper."""
    verdict: str
    """In words, with figures."""
    rule: str
    """How it was chosen, in words."""
    contrasts: tuple[FinalistComparison, ...] = ()
    """The closest first; none without finals."""
    front: tuple[str, ...] = ()
    """With several objectives: the trials that no other beats in all of them."""
    notes: tuple[str, ...] = ()
    """Finalists that are missing, and why."""


@dataclass(frozen=True)
class Winner:
    """What was trained of the choice, and where it is."""

    train: TrainReport
    alias: str | None
    before: str | None
    """Version that `alias` pointed at before; None: nothing."""
    beside: str | None
    """Version that the alias of `shadow.against` pointed at before: the control of the shadow."""
    moved: bool
    """`alias` points at the winner since."""
    why: str
    """Why it was moved, or was not."""


@dataclass(frozen=True)
class TuneReport:
    """What a sweep found."""

    run_id: str
    trials: tuple[TrialRecord, ...]
    """In draw order."""
    best_id: str
    best: dict[str, JsonValue]
    best_spec: TrainSpec
    """`spec.train` with the best values: what to train on the full budget."""
    sampler: str
    """How the trials were drawn, in words."""
    choice: SearchDecision
    """Why this one, and how sure that is."""
    eval_rows: int
    """Held-out rows behind each loss."""
    wall_s: float
    """Of this attempt and of earlier ones; of a killed one up to its last report."""
    reused: bool
    """The sweep was done before; no trial ran."""
    winner: Winner | None = None
    """Set where the spec has `winner`."""
    page: str = ""
    """Where its `report.html` is."""

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of any trial's process."""
        return max(trial.peak_rss_bytes for trial in self.trials)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "best_spec": self.best_spec.model_dump(mode="json")}


def label_points(points: Sequence[Mapping[str, JsonValue]]) -> list[str]:
    """Each point in a few words: the keys in which they differ, all where they don't."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    differ = [key for key in keys if any(point.get(key) != points[0].get(key) for point in points)] or keys
    return [" ".join(f"{key.rsplit('.', 1)[-1]}={point[key]}" for key in differ if key in point) for point in points]


# Trials by a sweep's objectives: the value of each, and those that no other trial beats in all of them.


def value_of(record: TrialRecord, goal: Goal) -> float | None:
    """Return the last reported value of an objective, in the metric's own unit; None where none was reported."""
    if not record.losses:
        return None
    if goal.metric == EVAL_LOSS:
        return record.losses[-1][1]
    if goal.metric in ("wall_s", "peak_rss_bytes"):
        return float(getattr(record, goal.metric))
    return record.metrics.get(goal.metric)


def pareto(records: Sequence[TrialRecord], objectives: Sequence[Goal]) -> tuple[TrialRecord, ...]:
    """Return the Pareto front: trials that ran to their end and that no other trial dominates.

    In the order of `records`. Repeats of finalists, and trials that lack a value, take no part.
    """
    rated: list[tuple[TrialRecord, tuple[float, ...]]] = []
    for record in records:
        values = [value for goal in objectives if (value := value_of(record, goal)) is not None]
        if record.state == "finished" and record.repeat_of is None and len(values) == len(objectives):
            signs = [1 if goal.direction == "min" else -1 for goal in objectives]
            rated.append((record, tuple(sign * value for sign, value in zip(signs, values, strict=True))))

    def dominated(mine: tuple[float, ...]) -> bool:
        return any(costs != mine and all(x <= y for x, y in zip(costs, mine, strict=True)) for _, costs in rated)

    return tuple(record for record, costs in rated if not dominated(costs))
