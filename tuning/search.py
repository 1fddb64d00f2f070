"""Search of a sweep: the protocol of a search algorithm, and what the algorithms share.

Shared are the points of a space and the trial of a point, points drawn without repeats, and the outcomes of trials as a
model of the loss takes them. Each algorithm is a file `search_<name>.py` with its spec; the union is in spec.py.
"""

import hashlib
import itertools
import math
import random
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import JsonValue

from graftwork.config import canonical_json
from graftwork.errors import ConfigError
from graftwork.training.spec import TrainSpec
from graftwork.tuning.search_space import (
    EVAL_LOSS,
    Domain,
    Goal,
    IntRange,
    LogUniform,
    Uniform,
    decides_rows,
    hint_for_key,
)

if TYPE_CHECKING:
    from graftwork.tuning.spec import TuneSpec  # which has the union of the algorithms
    from graftwork.tuning.trials import TrialRecord

# Points of a sweep, their identity, and the training spec of each.


Values = dict[str, JsonValue]
"""Dotted keys of the training spec and the value that a trial takes for each."""


def grid_size(space: Mapping[str, Domain]) -> int | None:
    """Number of combinations, None where a key is a range of floats."""
    sizes = [len(listed) for domain in space.values() if (listed := domain.listed()) is not None]
    return math.prod(sizes) if len(sizes) == len(space) else None


def grid(space: Mapping[str, Domain]) -> Iterator[Values]:
    """All combinations of a space without ranges of floats, the last key changing fastest."""
    listed = [values for domain in space.values() if (values := domain.listed()) is not None]
    for combination in itertools.product(*listed):
        yield dict(zip(space, combination, strict=True))


def sample(domain: Domain, u: float) -> JsonValue:
    """The value at quantile `u` in [0, 1)."""
    if isinstance(domain, LogUniform):
        return rounded(domain, math.exp(math.log(domain.low) + u * (math.log(domain.high) - math.log(domain.low))))
    if isinstance(domain, IntRange) and domain.log:  # each whole number has its half on both sides
        low, high = math.log(domain.low - 0.5), math.log(domain.high + 0.5)
        return min(max(round(math.exp(low + u * (high - low))), domain.low), domain.high)
    if isinstance(domain, Uniform):
        return rounded(domain, domain.low + u * (domain.high - domain.low))
    listed = domain.listed()
    return listed[int(u * len(listed))]


def rounded(domain: Uniform | LogUniform, value: float) -> float:
    """Four significant digits, so that it can be typed again; never outside of the range."""
    return min(max(float(f"{value:.4g}"), domain.low), domain.high)


def digest(values: Values) -> str:
    """Identity of a trial within its sweep: 8 hex digits over its values."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()[:8]


def trial_spec(spec: "TuneSpec", point: Values, *, distributed: bool = False) -> TrainSpec:
    """The training spec of a trial, with the sweep's held-out rows: for one process, where a strategy would have
    nothing to share, or for the workers and the strategy of `train`.

    Raises ConfigError when values that are allowed alone contradict each other.
    """
    alone = {} if distributed else {"num_workers": 1, "strategy": {}}
    return spec.train.with_({**point, **alone, "data.eval_rows": spec.eval_rows})


def contradiction(spec: "TuneSpec", point: Values) -> ConfigError | None:
    """Why values that are allowed alone can't go together; None where they can."""
    try:
        spec.train.with_(point)
    except ConfigError as error:
        return error
    return None


def rows_points(spec: "TuneSpec") -> Iterator[Values]:
    """The combinations of those keys of the space that decide a trial's rows: few, and all known beforehand."""
    return grid({key: domain for key, domain in spec.space.items() if decides_rows(key)})


def rows_key(values: Values) -> str:
    """Equal for trials that train on the same rows in the same order, when they are of one sweep."""
    return canonical_json({key: value for key, value in values.items() if decides_rows(key)})


# Outcomes of trials for a model of the loss: costs, of which less is better.


Costs = tuple[float, ...]
GROWING = ("wall_s", "tokens")
"""Metrics that go with the steps taken."""
FAR = 3.0
"""A loss this many times as far from the best as the median counts as no worse. Learning rates that are too high end at
ten times the loss of others; next to such a value a Gaussian process sees no difference among the good ones."""


@dataclass(frozen=True)
class Outcome:
    """One trial as a model sees it."""

    values: Values
    costs: Costs | None = None
    """One a goal; None: not known, so that it only keeps others away."""
    losses: tuple[tuple[int, float], ...] = ()
    """Of a trial that was stopped, where its costs are not known."""
    running: bool = False


def as_reported(trials: "Sequence[TrialRecord]") -> list[Outcome]:
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


def as_forecast(trials: "Sequence[TrialRecord]", objectives: Sequence[Goal], steps: int) -> list[Outcome]:
    """By all objectives, for a model that takes whole trials only.

    A stopped trial is taken for one that would have fallen on as the median of the finished did from that step, at the
    pace of its own steps; a failed one for as bad as the worst in every objective.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    costs_of = {trial.trial_id: _costs(trial, objectives, steps, finished) for trial in trials}
    known = {trial_id: costs for trial_id, costs in costs_of.items() if costs is not None}
    losses = sorted(costs[0] for costs in known.values())
    if len(losses) >= 3:
        limit = losses[0] + FAR * (statistics.median(losses) - losses[0])
        known = {trial_id: (min(costs[0], limit), *costs[1:]) for trial_id, costs in known.items()}
    worst = tuple(max(column) for column in zip(*known.values(), strict=True))
    found = []
    for trial in trials:
        costs = known.get(trial.trial_id, worst if trial.state == "failed" and worst else None)
        if costs is not None:
            found.append(Outcome(trial.values, costs))
        elif trial.state in ("running", "pending"):
            found.append(Outcome(trial.values, running=True))
    return found


def at_furthest_step(trials: "Sequence[TrialRecord]", enough: int) -> list[Outcome] | None:
    """By the loss at the furthest step that `enough` trials reported at, in any state (BOHB's budgets).

    None where there is no such step. A failed trial counts as one that reported there, as the worst.
    """
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


def _costs(
    trial: "TrialRecord", objectives: Sequence[Goal], steps: int, finished: "Sequence[TrialRecord]"
) -> Costs | None:
    from graftwork.tuning.trials import value_of  # which imports the reports: a spec needs none

    if trial.state not in ("finished", "stopped"):
        return None
    costs = []
    for goal in objectives:
        value = value_of(trial, goal)
        if value is None:
            return None
        if trial.state == "stopped" and goal.metric in GROWING:
            value = value * steps / trial.steps
        elif trial.state == "stopped" and goal.metric == EVAL_LOSS:
            ends = [(dict(other.losses).get(trial.steps), other.losses[-1][1]) for other in finished]
            falls = [end / loss for loss, end in ends if loss]
            value *= statistics.median(falls) if falls else 1.0
        costs.append(value if goal.direction == "min" else -value)
    return tuple(costs)


# Search: the protocol.


@dataclass(frozen=True)
class Suggestion:
    """The next trial."""

    values: Values
    repeat_of: str | None = None
    """The trial that this one repeats with another seed."""
    parent: str | None = None
    """The trial whose last checkpoint this one begins from."""
    until: int | None = None
    """Optimizer step that it ends at; None: the sweep's last."""


class Wait:
    """Nothing can be chosen before a running trial has ended."""


class Search(Protocol):
    """Chooses the next point. It has no state: the choice follows from the spec, its seed and `trials` alone, so that a
    sweep that resumes after a kill chooses as it would have."""

    @property
    def total(self) -> int:
        """Most trials that it chooses."""
        ...

    @property
    def reason(self) -> str:
        """The search and its settings as text: `random: 4 by seed 0`."""
        ...

    def suggest(self, trials: "Sequence[TrialRecord]") -> Suggestion | Wait | None:
        """The trial after `trials` (all of the sweep, in the order in which they were chosen); None: there is no more.

        Raises ConfigError when the values contradict each other.
        """
        ...


def select_searched(trials: "Sequence[TrialRecord]") -> "tuple[TrialRecord, ...]":
    """The trials that a search has chosen: repeats of finalists are not."""
    return tuple(trial for trial in trials if trial.repeat_of is None)


@dataclass(frozen=True)
class FixedPoints:
    """A search whose points do not depend on any result."""

    points: tuple[Values, ...]
    reason: str

    @property
    def total(self) -> int:
        """All points."""
        return len(self.points)

    def suggest(self, trials: "Sequence[TrialRecord]") -> Suggestion | None:
        """The points in their order."""
        number = len(select_searched(trials))
        return Suggestion(self.points[number]) if number < len(self.points) else None


ENUMERATED = 512
"""Combinations up to which all are checked beforehand (about a millisecond each)."""
REDRAWS = 200
"""Draws in a row that may be known already or contradict themselves before drawing is given up."""


def most(spec: "TuneSpec") -> int:
    """Trials that a search can choose: `num_trials`, or all points of a smaller space. Raises ConfigError where all
    combinations are few enough to be checked and one contradicts itself."""
    size = grid_size(spec.space)
    for point in grid(spec.space) if size is not None and size <= ENUMERATED else ():
        require_runnable(spec, point)
    return spec.num_trials if size is None else min(size, spec.num_trials)


def fresh_points(spec: "TuneSpec", rng: random.Random, known: Collection[str]) -> Iterator[Values]:
    """Points without end, drawn by `rng`: none repeats another or one of the digests `known`, none contradicts itself.

    Ends when many draws in a row brought none; raises ConfigError where that was for their contradictions.
    """
    # random() alone is used: Python promises its sequence for a seed over versions.
    seen, refused, tries = set(known), None, 0
    limit = max(REDRAWS, 20 * min(grid_size(spec.space) or 0, 4096))  # the last of so many is missed once in e**20
    while tries < limit:
        point = {key: sample(domain, rng.random()) for key, domain in spec.space.items()}
        tries += 1
        if digest(point) in seen:
            continue
        if (wrong := contradiction(spec, point)) is not None:
            refused = wrong
            continue
        seen.add(digest(point))
        tries, refused = 0, None
        yield point
    if refused is not None:
        raise ConfigError(
            "space",
            f"{tries} points drawn in a row contradict themselves, the last: {refused.subject}: {refused.problem}",
            refused.rule,
            hint_for_key(_key_of(spec, refused), refused),
        )


def require_runnable(spec: "TuneSpec", point: Values) -> None:
    wrong = contradiction(spec, point)
    if wrong is not None:
        values = ", ".join(f"{key}={value}" for key, value in point.items())
        found = f"{wrong.subject.removeprefix('override: ')}: {wrong.problem}"
        raise ConfigError(
            f"space: {values}",
            found,
            wrong.rule or "every combination must be a spec that can be run",
            hint_for_key(_key_of(spec, wrong), wrong)
            or "give whole parts, e.g. adapter: {kind: choice, values: [{kind: lora, rank: 8}, {kind: ia3}]}",
        )


def _key_of(spec: "TuneSpec", wrong: ConfigError) -> str:
    return next((key for key in spec.space if key.partition(".")[0] in wrong.subject), "")
