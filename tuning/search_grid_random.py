"""Grid and random search: all points are known before the first trial."""

import itertools
import random
from typing import TYPE_CHECKING, Literal

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.tuning.search import (
    FixedPoints,
    Values,
    fresh_points,
    grid,
    grid_size,
    most,
    require_runnable,
)
from graftwork.tuning.search_space import CategoricalSpace

if TYPE_CHECKING:
    from graftwork.tuning.spec import TuneSpec


class GridSpec(Spec):
    """Every combination of the listed values, in order."""

    kind: Literal["grid"] = "grid"

    def start(self, spec: "TuneSpec") -> FixedPoints:
        """Return the search. Raises ConfigError when it can't search this space."""
        return grid_search(spec)


class RandomSpec(Spec):
    """Points drawn at random, without repeats."""

    kind: Literal["random"] = "random"

    def start(self, spec: "TuneSpec") -> FixedPoints:
        """Return the search. Raises ConfigError when it can't search this space."""
        return random_search(spec)


def grid_search(spec: "TuneSpec") -> FixedPoints:
    """Raises ConfigError when a key is a range, the grid is larger than `num_trials`, or a point contradicts itself."""
    size = grid_size(spec.space)
    if size is None or size > spec.num_trials:
        found = "the space has a range" if size is None else f"the grid has {size} points, num_trials={spec.num_trials}"
        raise ConfigError(
            "search.kind=grid", found, "a grid is run whole", "list the values of every key, and raise num_trials"
        )
    reason = f"grid: all {size} combinations of the listed values (num_trials={spec.num_trials} allows it)"
    points = sorted(grid(spec.space), key=lambda point: _from_middle(spec, point))
    for point in points:
        require_runnable(spec, point)
    return FixedPoints("grid", tuple(points), reason)


def _from_middle(spec: "TuneSpec", point: Values) -> float:
    """How far a point of a grid lies from its middle, in shares of the listed numbers of each key.

    The middle comes first, for a range is laid around what is expected: those that come later have something good to
    be compared with, and early stopping needs half of the compute (benchmarks/asha.py).
    """
    away = 0.0
    for key, domain in spec.space.items():
        numbers = (
            [one for one in domain.values if isinstance(one, int | float)]
            if isinstance(domain, CategoricalSpace)
            else []
        )
        if isinstance(domain, CategoricalSpace) and len(numbers) == len(domain.values) and key != "seed":
            away += abs(domain.values.index(point[key]) - (len(numbers) - 1) / 2) / len(numbers)
    return away


def random_search(spec: "TuneSpec") -> FixedPoints:
    """Equal specs draw equal points, and a larger `num_trials` keeps the first ones. Raises ConfigError when values
    contradict each other, or too many do to draw what is asked."""
    count, of = most(spec), f" of {size} combinations" if (size := grid_size(spec.space)) is not None else ""
    points = tuple(itertools.islice(fresh_points(spec, random.Random(spec.seed), ()), count))
    return FixedPoints("random", points, f"random: {count}{of} by seed {spec.seed}")
