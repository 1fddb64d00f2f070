"""TPE, GP and BOHB by Optuna: points at random first, then those that a model of the losses predicts to be best.

A study in memory is made of the trials for each point, so that a search has no state. Optuna is imported when a point
is first asked of a model.
"""

import contextlib
import hashlib
import itertools
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.tuning.search import (
    Outcome,
    Suggestion,
    Values,
    as_forecast,
    as_reported,
    at_furthest_step,
    contradiction,
    digest,
    fresh_points,
    most,
    rounded,
    select_searched,
)
from graftwork.tuning.search_space import CategoricalSpace, Domain, IntRange, LogUniform, PowerOfTwo, Space, Uniform

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    from graftwork.tuning.spec import TuneSpec
    from graftwork.tuning.trials import TrialRecord


class TpeSpec(Spec):
    """Tree-structured Parzen estimator (Bergstra 2011; arXiv 2304.11127) by Optuna."""

    kind: Literal["tpe"] = "tpe"
    n_startup: int = Field(default=4, ge=1)
    """First points, drawn at random by the seed: those of `kind: random`."""
    multivariate: bool = False
    """false: each key by itself, so that what any trial tells of the learning rate holds for all ranks: LoRA's best
    rate hardly moves with the rank. true: all keys together, for keys whose best values depend on each other."""

    def start(self, spec: "TuneSpec") -> "OptunaSearch":
        """Return the search. Raises ConfigError when it can't search this space."""
        return OptunaSearch.create(spec, self)


class GpSpec(Spec):
    """Bayesian optimisation with a Gaussian process by Optuna, log expected improvement (arXiv 2310.20708)."""

    kind: Literal["gp"] = "gp"
    n_startup: int = Field(default=4, ge=1)
    """First points, drawn at random by the seed: those of `kind: random`."""

    def start(self, spec: "TuneSpec") -> "OptunaSearch":
        """Return the search. Raises ConfigError when it can't search this space."""
        return OptunaSearch.create(spec, self)


class BohbSpec(Spec):
    """BOHB's search (Falkner et al. 2018, arXiv 1807.01774): all keys together, on the losses at the furthest step that
    enough trials reached. Goes with `scheduler: {kind: hyperband}`."""

    kind: Literal["bohb"] = "bohb"
    random_share: float = Field(default=1 / 3, ge=0, lt=1)
    """Points that are drawn at random all the same, so that a misleading early step can't lock the search."""

    def start(self, spec: "TuneSpec") -> "OptunaSearch":
        """Return the search. Raises ConfigError for several objectives, and when it can't search this space."""
        if len(spec.objectives) > 1:
            raise ConfigError(
                f"search.kind=bohb with objectives={[goal.metric for goal in spec.objectives]}",
                "bohb learns from losses at early steps, where other objectives mean little",
                "bohb optimizes one objective, the held-out loss",
                "take search: {kind: tpe} or {kind: gp}, or leave the other objectives out",
            )
        return OptunaSearch.create(spec, self)


@dataclass(frozen=True)
class OptunaSearch:
    """TPE, GP or BOHB."""

    spec: "TuneSpec"
    asked: TpeSpec | GpSpec | BohbSpec
    total: int

    @classmethod
    def create(cls, spec: "TuneSpec", asked: TpeSpec | GpSpec | BohbSpec) -> "OptunaSearch":
        """Return a search that has a first point. Raises ConfigError when the values contradict each other."""
        search = cls(spec, asked, most(spec))
        search._at_random(0, set())
        return search

    @property
    def reason(self) -> str:
        """In words."""
        seed, objectives = self.spec.seed, len(self.spec.objectives)
        if isinstance(self.asked, BohbSpec):
            how = f"{self.asked.random_share:.0%} at random by seed {seed}, the others by TPE on all keys together, at "
            return f"bohb: {how}the furthest step that {min_reports(self.spec)} trials reported at; {self.total} in all"
        first = f"{min(self.asked.n_startup, self.total)} points at random by seed {seed}, then by a model of "
        model = "the losses" if objectives == 1 else f"{objectives} objectives"
        apart = ""
        if isinstance(self.asked, TpeSpec) and len(self.spec.space) > 1:
            apart = ", all keys together" if self.asked.multivariate else ", each key by itself"
        return f"{self.asked.kind}: {first}{model}{apart}; {self.total} in all"

    def suggest(self, trials: "Sequence[TrialRecord]") -> Suggestion | None:
        """None after `total` trials, or when the space has no other point."""
        chosen = select_searched(trials)
        if len(chosen) >= self.total:
            return None
        known = {digest(trial.values) for trial in chosen}
        outcomes = self._outcomes(chosen)
        proposed = () if outcomes is None else points(self.spec, self.asked, outcomes, self._seed(len(chosen), "model"))
        for point in proposed:
            if digest(point) not in known and contradiction(self.spec, point) is None:
                return Suggestion(point)
        drawn = self._at_random(len(chosen), known)
        return Suggestion(drawn) if drawn is not None else None

    def _outcomes(self, chosen: "Sequence[TrialRecord]") -> list[Outcome] | None:
        """Outcomes that the model learns from; None: the next point is drawn at random."""
        objectives, number = self.spec.objectives, len(chosen)
        if isinstance(self.asked, BohbSpec):
            at_random = random.Random(self._seed(number, "share")).random() < self.asked.random_share
            return None if at_random else at_furthest_step(chosen, min_reports(self.spec))
        if number < self.asked.n_startup:
            return None
        if isinstance(self.asked, TpeSpec) and len(objectives) == 1:
            return as_reported(chosen)
        return as_forecast(chosen, objectives, self.spec.steps)

    def _at_random(self, number: int, known: set[str]) -> Values | None:
        """First the points of `kind: random` with the same seed, later one drawn for this trial."""
        if not isinstance(self.asked, BohbSpec) and number < self.asked.n_startup:
            first = fresh_points(self.spec, random.Random(self.spec.seed), ())
            return next(itertools.islice(first, number, None), None)
        return next(fresh_points(self.spec, random.Random(self._seed(number, "drawn")), known), None)

    def _seed(self, number: int, use: str) -> int:
        """Return the seed of one trial, so that a search that resumes needs no state of a generator."""
        return int.from_bytes(hashlib.sha256(f"{self.spec.seed}/{number}/{use}".encode()).digest()[:4], "big")


def min_reports(spec: "TuneSpec") -> int:
    """Reports at a step from which BOHB fits a model there: two more than keys and one (Falkner et al. 2018)."""
    return len(spec.space) + 3


TRIES = 20
"""Points asked of a model for one trial. Each counts as running for the next, which keeps that one away from it."""


def points(
    spec: "TuneSpec", asked: TpeSpec | GpSpec | BohbSpec, outcomes: Sequence[Outcome], seed: int
) -> Iterator[Values]:
    """Up to `TRIES` points, best first."""
    import optuna

    distributions = {key: _distribution(key, domain) for key, domain in spec.space.items()}
    with _quiet_logging():
        study = optuna.create_study(sampler=_sampler(asked, seed), directions=["minimize"] * len(spec.objectives))
        study.add_trials([_to_frozen_trial(outcome, spec.space, distributions) for outcome in outcomes])
    for _ in range(TRIES):
        with _quiet_logging():
            found = study.ask(distributions).params
        yield {key: _value(domain, found[key]) for key, domain in spec.space.items()}


def _sampler(asked: TpeSpec | GpSpec | BohbSpec, seed: int) -> "BaseSampler":
    from optuna.samplers import GPSampler, TPESampler

    if isinstance(asked, GpSpec):
        return GPSampler(seed=seed, n_startup_trials=1)
    together = isinstance(asked, BohbSpec) or asked.multivariate
    return TPESampler(seed=seed, n_startup_trials=1, constant_liar=True, multivariate=together)


def _to_frozen_trial(outcome: Outcome, space: Space, distributions: "dict[str, BaseDistribution]") -> "FrozenTrial":
    """A trial without costs or reports (a failed one) ranks behind all others for TPE as a pruned one."""
    from optuna.trial import TrialState, create_trial

    fields: dict[str, Any] = {"distributions": distributions}
    fields["params"] = {key: _parameter(domain, outcome.values[key]) for key, domain in space.items()}
    if outcome.running:
        return create_trial(state=TrialState.RUNNING, **fields)
    if outcome.costs is not None:
        return create_trial(state=TrialState.COMPLETE, values=outcome.costs, **fields)
    return create_trial(state=TrialState.PRUNED, intermediate_values=dict(outcome.losses), **fields)


def _distribution(key: str, domain: Domain) -> "BaseDistribution":
    """Listed numbers are places of a scale, each near its neighbours; seeds and all else have no order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match domain:
        case Uniform() | LogUniform():
            return FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))
        case IntRange():
            return IntDistribution(domain.low, domain.high, log=domain.log)
        case CategoricalSpace() if key == "seed" or not _are_numbers(domain.values):
            return CategoricalDistribution(range(len(domain.values)))
    return IntDistribution(0, len(domain.listed()) - 1)


def _are_numbers(values: Sequence[JsonValue]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _scale(domain: CategoricalSpace | PowerOfTwo) -> Sequence[Any]:
    """The places of listed values."""
    values: Sequence[Any] = domain.listed()
    return sorted(values) if _are_numbers(values) else values


def _parameter(domain: Domain, value: Any) -> Any:
    """As Optuna has it: the place of a listed value, since a value may be a whole part of a spec."""
    return _scale(domain).index(value) if isinstance(domain, CategoricalSpace | PowerOfTwo) else value


def _value(domain: Domain, parameter: Any) -> JsonValue:
    if isinstance(domain, Uniform | LogUniform):
        return rounded(domain, parameter)
    place: JsonValue = (
        _scale(domain)[parameter] if isinstance(domain, CategoricalSpace | PowerOfTwo) else int(parameter)
    )
    return place


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Silence Optuna's log line of each trial and its warnings that an interface is experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
