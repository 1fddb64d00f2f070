"""The points of a sweep: drawn all at once, by the seed alone, and checked before anything starts."""

import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from graftwork.config import canonical_json
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import Choice, Domain, LogUniform, TuneSpec

Values = dict[str, JsonValue]
"""Dotted keys of the training spec and the value that a trial takes for each."""


@dataclass(frozen=True)
class Draw:
    """The values of each trial, in the order in which trials start."""

    sampler: Literal["grid", "random"]
    points: tuple[Values, ...]
    reason: str


def draw(spec: TuneSpec) -> Draw:
    """The trials of a sweep: equal specs draw equal points, and a larger `num_trials` keeps the first ones.

    Raises ConfigError when two values that are allowed alone contradict each other.
    """
    size = grid_size(spec)
    if size is not None and size <= spec.num_trials:
        reason = f"grid: all {size} combinations of the listed values (num_trials={spec.num_trials} allows it)"
        drawn = Draw("grid", tuple(_grid(spec)), reason)
    else:
        of = f" of {size} combinations" if size is not None else ""
        drawn = Draw("random", tuple(_random(spec)), f"random: {spec.num_trials}{of} by seed {spec.seed}")
    for point in drawn.points:
        spec.train.with_(point)
    return drawn


def grid_size(spec: TuneSpec) -> int | None:
    """Number of combinations, None where a key is a range."""
    sizes = [len(domain.values) for domain in spec.space.values() if isinstance(domain, Choice)]
    return math.prod(sizes) if len(sizes) == len(spec.space) else None


def digest(values: Values) -> str:
    """Identity of a trial within its sweep: 8 hex digits over its values."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()[:8]


def trial_spec(spec: TuneSpec, point: Values) -> TrainSpec:
    """The training spec of a trial: one process, the sweep's held-out rows. A strategy would have nothing to share."""
    alone = {"num_workers": 1, "strategy": {}}
    return spec.train.with_({**point, **alone, "data.eval_rows": spec.eval_rows})


def _grid(spec: TuneSpec) -> Iterator[Values]:
    listed = [domain.values for domain in spec.space.values() if isinstance(domain, Choice)]
    for combination in itertools.product(*listed):
        yield dict(zip(spec.space, combination, strict=True))


def _random(spec: TuneSpec) -> Iterator[Values]:
    # random() alone is used: Python promises its sequence for a seed over versions.
    rng = random.Random(spec.seed)
    seen: set[str] = set()
    while len(seen) < spec.num_trials:
        point = {key: _sample(domain, rng.random()) for key, domain in spec.space.items()}
        if digest(point) not in seen:
            seen.add(digest(point))
            yield point


def _sample(domain: Domain, u: float) -> JsonValue:
    """The value at quantile `u` in [0, 1). Floats have four significant digits, so that they can be typed again."""
    if isinstance(domain, Choice):
        return domain.values[int(u * len(domain.values))]
    if isinstance(domain, LogUniform):
        value = math.exp(math.log(domain.low) + u * (math.log(domain.high) - math.log(domain.low)))
    else:
        value = domain.low + u * (domain.high - domain.low)
    return min(max(float(f"{value:.4g}"), domain.low), domain.high)
