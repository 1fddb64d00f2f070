"""Grid and random search: all points are known before the first trial."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graftwork.errors import ConfigError
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.search.protocol import Suggestion
from graftwork.tuning.space import Values, digest, grid, grid_size, sample
from graftwork.tuning.spec import TuneSpec


@dataclass(frozen=True)
class Drawn:
    """A search whose points do not depend on any result."""

    name: str
    points: tuple[Values, ...]
    reason: str

    @property
    def total(self) -> int:
        """All points."""
        return len(self.points)

    def suggest(self, trials: Sequence[TrialRecord]) -> Suggestion | None:
        """The points in their order."""
        return Suggestion(self.points[len(trials)]) if len(trials) < len(self.points) else None


def grid_search(spec: TuneSpec) -> Drawn:
    """Raises ConfigError when a key is a range, or the grid is larger than `num_trials`."""
    size = grid_size(spec.space)
    if size is None or size > spec.num_trials:
        found = "the space has a range" if size is None else f"the grid has {size} points, num_trials={spec.num_trials}"
        raise ConfigError(
            "search.kind=grid", found, "a grid is run whole", "list the values of every key, and raise num_trials"
        )
    reason = f"grid: all {size} combinations of the listed values (num_trials={spec.num_trials} allows it)"
    return _checked(spec, Drawn("grid", tuple(grid(spec.space)), reason))


def random_search(spec: TuneSpec) -> Drawn:
    """Equal specs draw equal points, and a larger `num_trials` keeps the first ones."""
    size = grid_size(spec.space)
    count = spec.num_trials if size is None else min(size, spec.num_trials)
    of = f" of {size} combinations" if size is not None else ""
    return _checked(spec, Drawn("random", tuple(_random(spec, count)), f"random: {count}{of} by seed {spec.seed}"))


def _checked(spec: TuneSpec, drawn: Drawn) -> Drawn:
    for point in drawn.points:
        spec.train.with_(point)
    return drawn


def _random(spec: TuneSpec, count: int) -> Iterator[Values]:
    # random() alone is used: Python promises its sequence for a seed over versions.
    rng = random.Random(spec.seed)
    seen: set[str] = set()
    while len(seen) < count:
        point = {key: sample(domain, rng.random()) for key, domain in spec.space.items()}
        if digest(point) not in seen:
            seen.add(digest(point))
            yield point
