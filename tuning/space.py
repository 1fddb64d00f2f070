"""Points of a sweep: what they are, how they are told apart, and the run that each asks for."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping

from pydantic import JsonValue

from graftwork.config import canonical_json
from graftwork.errors import ConfigError
from graftwork.training.spec import TrainSpec
from graftwork.tuning.space_spec import Domain, IntRange, LogUniform, Uniform
from graftwork.tuning.spec import TuneSpec, decides_rows

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


def trial_spec(spec: TuneSpec, point: Values, *, gang: bool = False) -> TrainSpec:
    """The training spec of a trial, with the sweep's held-out rows: for one process, where a strategy would have
    nothing to share, or for the workers and the strategy of `train`.

    Raises ConfigError when values that are allowed alone contradict each other.
    """
    alone = {} if gang else {"num_workers": 1, "strategy": {}}
    return spec.train.with_({**point, **alone, "data.eval_rows": spec.eval_rows})


def contradiction(spec: TuneSpec, point: Values) -> ConfigError | None:
    """Why values that are allowed alone can't go together; None where they can."""
    try:
        spec.train.with_(point)
    except ConfigError as error:
        return error
    return None


def rows_points(spec: TuneSpec) -> Iterator[Values]:
    """The combinations of those keys of the space that decide a trial's rows: few, and all known beforehand."""
    return grid({key: domain for key, domain in spec.space.items() if decides_rows(key)})


def rows_key(values: Values) -> str:
    """Equal for trials that train on the same rows in the same order, when they are of one sweep."""
    return canonical_json({key: value for key, value in values.items() if decides_rows(key)})
