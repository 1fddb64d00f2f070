"""What the trials so far tell a model of the loss: in costs, of which less is better."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.tuning.goal_spec import EVAL_LOSS, Goal
from graftwork.tuning.goals import value_of
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.space import Values

Costs = tuple[float, ...]
GROWING = ("wall_s", "tokens")
"""Metrics that go with the steps taken."""
FAR = 3.0
"""A loss that is so many times as far from the best as the median is is as bad as any. Learning rates that are too high
end at ten times the loss of others; beside such a value a Gaussian process sees no difference among the good."""


@dataclass(frozen=True)
class Outcome:
    """One trial as a model sees it."""

    values: Values
    costs: Costs | None = None
    """One a goal; None: not known, so that it only keeps others away."""
    losses: tuple[tuple[int, float], ...] = ()
    """Of a trial that was stopped, where its costs are not known."""
    running: bool = False


def as_reported(trials: Sequence[TrialRecord]) -> list[Outcome]:
    """By held-out loss alone, as TPE takes it: what was stopped ranks behind what finished, by step and loss; what
    failed ranks last."""
    found = []
    for trial in trials:
        if trial.state == "finished" and trial.losses:
            found.append(Outcome(trial.values, (trial.losses[-1][1],)))
        elif trial.state in ("stopped", "failed"):
            found.append(Outcome(trial.values, losses=trial.losses if trial.state == "stopped" else ()))
        else:
            found.append(Outcome(trial.values, running=True))
    return found


def as_forecast(trials: Sequence[TrialRecord], objectives: Sequence[Goal], steps: int) -> list[Outcome]:
    """By all objectives, for a model that takes whole trials only.

    A stopped trial is taken for one that would have fallen on as the median of the finished did from that step, at the
    pace of its own steps; a failed one for as bad as the worst in every objective.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    costs_of = {trial.trial_id: _costs(trial, objectives, steps, finished) for trial in trials}
    known = {trial_id: costs for trial_id, costs in costs_of.items() if costs is not None}
    known = _without_far(known)
    worst = tuple(max(column) for column in zip(*known.values(), strict=True))
    found = []
    for trial in trials:
        costs = known.get(trial.trial_id, worst if trial.state == "failed" and worst else None)
        if costs is not None:
            found.append(Outcome(trial.values, costs))
        elif trial.state in ("running", "pending"):
            found.append(Outcome(trial.values, running=True))
    return found


def at_furthest_step(trials: Sequence[TrialRecord], enough: int) -> list[Outcome] | None:
    """By the loss at the furthest step that `enough` trials reported at, whatever became of them (BOHB's budgets); None
    where there is no such step. A failed trial counts as one that reported there, as the worst."""
    failed = [trial for trial in trials if trial.state == "failed"]
    reports = {trial.trial_id: dict(trial.losses) for trial in trials if trial.state != "failed"}
    for step in sorted({step for losses in reports.values() for step in losses}, reverse=True):
        at_step = {name: losses[step] for name, losses in reports.items() if step in losses}
        if len(at_step) + len(failed) >= enough:
            worst = max(at_step.values())
            found = [Outcome(t.values, (at_step[t.trial_id],)) for t in trials if t.trial_id in at_step]
            found += [Outcome(trial.values, (worst,)) for trial in failed]
            return found + [
                Outcome(t.values, running=True)
                for t in trials
                if t.state in ("running", "pending") and t.trial_id not in at_step
            ]
    return None


def _without_far(known: dict[str, Costs]) -> dict[str, Costs]:
    losses = sorted(costs[0] for costs in known.values())
    if len(losses) < 3:
        return known
    limit = losses[0] + FAR * (statistics.median(losses) - losses[0])
    return {name: (min(costs[0], limit), *costs[1:]) for name, costs in known.items()}


def _costs(trial: TrialRecord, objectives: Sequence[Goal], steps: int, finished: Sequence[TrialRecord]) -> Costs | None:
    if trial.state not in ("finished", "stopped"):
        return None
    values = [value_of(trial, goal) for goal in objectives]
    if None in values:
        return None
    whole = [value for value in values if value is not None]
    if trial.state == "stopped":
        whole = [_forecast(trial, goal, value, steps, finished) for goal, value in zip(objectives, whole, strict=True)]
    return tuple(value if goal.direction == "min" else -value for goal, value in zip(objectives, whole, strict=True))


def _forecast(trial: TrialRecord, goal: Goal, value: float, steps: int, finished: Sequence[TrialRecord]) -> float:
    if goal.metric in GROWING:
        return value * steps / trial.steps
    if goal.metric != EVAL_LOSS:
        return value
    falls = [other.losses[-1][1] / dict(other.losses)[trial.steps] for other in finished
             if dict(other.losses).get(trial.steps)]  # fmt: skip
    return value * statistics.median(falls) if falls else value
