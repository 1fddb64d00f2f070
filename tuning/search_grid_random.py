"""Grid and random search: all points are known before the first trial."""

import itertools
import random
from typing import TYPE_CHECKING, Literal

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.tuning.search import FixedPoints, Values, fresh_points, grid, grid_size, most, require_runnable
from graftwork.tuning.search_space import CategoricalSpace

if TYPE_CHECKING:
    from graftwork.tuning.spec import TuneSpec


class GridSpec(Spec):
    """Every combination of the listed values, in order."""

    kind: Literal["grid"] = "grid"

    def start(self, spec: "TuneSpec") -> FixedPoints:
        """Return the search. Raises ConfigError when it can't search this space.

        That is so for a key with a range, a grid larger than `num_trials`, and a point that contradicts itself.
        """
        size = grid_size(spec.space)
        if size is None or size > spec.num_trials:
            grid_of = f"the grid has {size} points, num_trials={spec.num_trials}"
            raise ConfigError(
                "search.kind=grid",
                "the space has a range" if size is None else grid_of,
                "a grid is run whole",
                "list the values of every key, and raise num_trials",
            )
        reason = f"grid: all {size} combinations of the listed values (num_trials={spec.num_trials} allows it)"
        points = sorted(grid(spec.space), key=lambda point: _distance_from_middle(spec, point))
        for point in points:
            require_runnable(spec, point)
        return FixedPoints(tuple(points), reason)


def _distance_from_middle(spec: "TuneSpec", point: Values) -> float:
    """Return how far a point of a grid is from its middle, in shares of the listed numbers of each key.

    The middle runs first, because a range is chosen around the expected value: later trials are then compared with
    something good, and early stopping needs half of the compute (benchmarks/asha.py).
    """
    away = 0.0
    for key, domain in spec.space.items():
        if isinstance(domain, CategoricalSpace) and key != "seed":
            values = domain.values
            if all(isinstance(value, int | float) for value in values):
                away += abs(values.index(point[key]) - (len(values) - 1) / 2) / len(values)
    return away


class RandomSpec(Spec):
    """Points drawn at random, without repeats."""

    kind: Literal["random"] = "random"

    def start(self, spec: "TuneSpec") -> FixedPoints:
        """Return the search. Raises ConfigError when it can't search this space.

        Equal specs draw equal points, and a larger `num_trials` keeps the first ones.
        """
        count, of = most(spec), f" of {size} combinations" if (size := grid_size(spec.space)) is not None else ""
        points = tuple(itertools.islice(fresh_points(spec, random.Random(spec.seed), ()), count))
        return FixedPoints(points, f"random: {count}{of} by seed {spec.seed}")
