"""A sweep's trials as the record that its page shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.report.sweep_records import FrontPoint, FrontRecord, SweepKey, SweepRecord, SweepTrial, in_space
from graftwork.tuning.choice import rule
from graftwork.tuning.goals import pareto, value_of
from graftwork.tuning.page.axis import MOST_VALUES
from graftwork.tuning.page.finals import finals_record
from graftwork.tuning.page.heat import heat
from graftwork.tuning.page.importance import importance
from graftwork.tuning.page.stops import stops
from graftwork.tuning.page.values import settings, to_plain
from graftwork.tuning.records import SearchDecision, TrialRecord
from graftwork.tuning.space_spec import CategoricalSpace as Listed
from graftwork.tuning.space_spec import Domain, IntRange, LogUniform, PowerOfTwo
from graftwork.tuning.spec import TuneSpec


@dataclass(frozen=True)
class SweepEnd:
    """How an attempt at a sweep ended, and what the trials do not tell."""

    state: Literal["finished", "interrupted", "failed"]
    rows: int
    """Held-out rows behind each loss."""
    sampler: str
    """How the trials were drawn, in words."""
    wall_s: float
    choice: SearchDecision | None = None
    reused: bool = False
    error: str | None = None


def sweep_record(spec: TuneSpec, trials: Sequence[TrialRecord], ended: SweepEnd) -> SweepRecord:
    """What a sweep's trials say."""
    keys = [key_of(name, domain) for name, domain in spec.space.items()]
    shown = [trial_of(trial) for trial in trials]
    searched = [trial for trial in shown if trial.repeat_of is None and in_space(keys, trial)]
    choice = ended.choice
    best_id = choice.trial_id if choice else None
    best = next((trial.values for trial in trials if trial.trial_id == best_id), None)
    found = importance(keys, searched, spec.seed)
    return SweepRecord(
        name=spec.name, trials=tuple(shown), best_id=best_id, rows=ended.rows, seed=spec.seed, reused=ended.reused,
        state=ended.state, error=ended.error, steps=spec.steps, keys=tuple(keys),
        settings=settings(best) if best else "", sampler=ended.sampler, rule=rule(spec),
        scheduler=spec.scheduler.kind if spec.scheduler else "", at_once=most_at_once(trials),
        cpus=spec.train.cpus_per_worker, gpus=spec.train.gpus, wall_s=ended.wall_s, importance=found,
        heat=heat(keys, searched, found), stops=stops(searched, best_id, spec.steps) if spec.scheduler else None,
        front=_front(spec, trials), finals=finals_record(spec, trials, choice) if choice else None,
    )  # fmt: skip


def most_at_once(trials: Sequence[TrialRecord]) -> int:
    """Trials that ran at the same time, at most: of those that were started."""
    spans = [(trial.started_s, trial.started_s + trial.wall_s) for trial in trials if trial.state != "pending"]
    return max((sum(began <= start < end for began, end in spans) for start, _ in spans), default=1) or 1


def _front(spec: TuneSpec, trials: Sequence[TrialRecord]) -> FrontRecord | None:
    """None for one goal."""
    if len(spec.objectives) < 2:
        return None
    best = {trial.trial_id for trial in pareto(trials, spec.objectives)}
    points = []
    for trial in trials:
        values = [value for goal in spec.objectives if (value := value_of(trial, goal)) is not None]
        if trial.state == "finished" and trial.repeat_of is None and len(values) == len(spec.objectives):
            points.append(FrontPoint(id=trial.trial_id, values=tuple(values), on_front=trial.trial_id in best))
    names = tuple(goal.metric for goal in spec.objectives)
    return FrontRecord(objectives=names, points=tuple(points))


def key_of(name: str, domain: Domain) -> SweepKey:
    """A key of the space with its values as text or numbers."""
    if isinstance(domain, Listed):
        return SweepKey(name=name, values=tuple(to_plain(value) for value in domain.values))
    if isinstance(domain, PowerOfTwo) or (isinstance(domain, IntRange) and len(domain.listed()) <= MOST_VALUES):
        return SweepKey(name=name, values=tuple(domain.listed()))
    log = isinstance(domain, LogUniform) or (isinstance(domain, IntRange) and domain.log)
    return SweepKey(name=name, low=domain.low, high=domain.high, log=log)


def trial_of(trial: TrialRecord) -> SweepTrial:
    """A trial with its values as text or numbers."""
    return SweepTrial(
        id=trial.trial_id, values={key: to_plain(value) for key, value in trial.values.items()}, losses=trial.losses,
        state=trial.state, wall_s=trial.wall_s or None, started_s=trial.started_s or None, error=trial.error,
        notes=trial.notes, metrics=trial.metrics, repeat_of=trial.repeat_of,
    )  # fmt: skip
