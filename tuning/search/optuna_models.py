"""Optuna's samplers, asked through a study in memory that is made anew of the trials each time."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import JsonValue

from graftwork.tuning.search.outcomes import Outcome
from graftwork.tuning.search_spec import BohbSpec, GpSpec, TpeSpec
from graftwork.tuning.space import Values, rounded
from graftwork.tuning.space_spec import CategoricalSpace, Domain, IntRange, LogUniform, PowerOfTwo, Space, Uniform
from graftwork.tuning.spec import TuneSpec

TRIES = 20
"""Points asked of a model for one trial. Each counts as running for the next, which keeps that one away from it."""


def points(
    spec: TuneSpec, asked: TpeSpec | GpSpec | BohbSpec, outcomes: Sequence[Outcome], seed: int
) -> Iterator[Values]:
    """Up to `TRIES` points, best first."""
    distributions = {key: _distribution(key, domain) for key, domain in spec.space.items()}
    with _quiet():
        study = optuna.create_study(sampler=_sampler(asked, seed), directions=["minimize"] * len(spec.objectives))
        study.add_trials([_to_frozen_trial(outcome, spec.space, distributions) for outcome in outcomes])
    for _ in range(TRIES):
        with _quiet():
            found = study.ask(distributions).params
        yield {key: _value(domain, found[key]) for key, domain in spec.space.items()}


def _sampler(asked: TpeSpec | GpSpec | BohbSpec, seed: int) -> BaseSampler:
    if isinstance(asked, GpSpec):
        return GPSampler(seed=seed, n_startup_trials=1)
    together = isinstance(asked, BohbSpec) or asked.multivariate
    return TPESampler(seed=seed, n_startup_trials=1, constant_liar=True, multivariate=together)


def _to_frozen_trial(outcome: Outcome, space: Space, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    """A trial without costs or reports (a failed one) ranks behind all others for TPE as a pruned one."""
    told: dict[str, Any] = {"distributions": distributions}
    told["params"] = {key: _parameter(domain, outcome.values[key]) for key, domain in space.items()}
    if outcome.running:
        return create_trial(state=TrialState.RUNNING, **told)
    if outcome.costs is not None:
        return create_trial(state=TrialState.COMPLETE, values=outcome.costs, **told)
    return create_trial(state=TrialState.PRUNED, intermediate_values=dict(outcome.losses), **told)


def _distribution(key: str, domain: Domain) -> BaseDistribution:
    """Listed numbers are places of a scale, each near its neighbours; seeds and all else have no order."""
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
def _quiet() -> Iterator[None]:
    """Optuna tells of each trial, and warns that what is used here may change with its next version."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
