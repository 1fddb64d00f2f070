"""Grid and random search: all points are known before the first trial."""

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from graftwork.errors import ConfigError
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.search.protocol import Suggestion, select_searched
from graftwork.tuning.space import Values, contradiction, digest, grid, grid_size, sample
from graftwork.tuning.space_spec import CategoricalSpace
from graftwork.tuning.spec import TuneSpec, hint_for_key

ENUMERATED = 512
"""Combinations up to which all are checked beforehand (about a millisecond each)."""
REDRAWS = 200
"""Draws in a row that may be known already or contradict themselves before drawing is given up."""


@dataclass(frozen=True)
class FixedPoints:
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
        number = len(select_searched(trials))
        return Suggestion(self.points[number]) if number < len(self.points) else None


def grid_search(spec: TuneSpec) -> FixedPoints:
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
        _refuse(spec, point)
    return FixedPoints("grid", tuple(points), reason)


def _from_middle(spec: TuneSpec, point: Values) -> float:
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


def random_search(spec: TuneSpec) -> FixedPoints:
    """Equal specs draw equal points, and a larger `num_trials` keeps the first ones. Raises ConfigError when values
    contradict each other, or too many do to draw what is asked."""
    count, of = most(spec), f" of {size} combinations" if (size := grid_size(spec.space)) is not None else ""
    points = tuple(itertools.islice(fresh_points(spec, random.Random(spec.seed), ()), count))
    return FixedPoints("random", points, f"random: {count}{of} by seed {spec.seed}")


def most(spec: TuneSpec) -> int:
    """Trials that a search can choose: `num_trials`, or all points of a smaller space. Raises ConfigError where all
    combinations are few enough to be checked and one contradicts itself."""
    size = grid_size(spec.space)
    for point in grid(spec.space) if size is not None and size <= ENUMERATED else ():
        _refuse(spec, point)
    return spec.num_trials if size is None else min(size, spec.num_trials)


def fresh_points(spec: TuneSpec, rng: random.Random, known: Collection[str]) -> Iterator[Values]:
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


def _refuse(spec: TuneSpec, point: Values) -> None:
    wrong = contradiction(spec, point)
    if wrong is not None:
        values = ", ".join(f"{key}={value}" for key, value in point.items())
        found = f"{wrong.subject.removeprefix('override: ')}: {wrong.problem}"
        raise ConfigError(f"space: {values}", found, wrong.rule or "every combination must be a spec that can be run",
                          hint_for_key(_key_of(spec, wrong), wrong) or _WHOLE)  # fmt: skip


_WHOLE = "give whole parts, e.g. adapter: {kind: choice, values: [{kind: lora, rank: 8}, {kind: ia3}]}"


def _key_of(spec: TuneSpec, wrong: ConfigError) -> str:
    return next((key for key in spec.space if key.partition(".")[0] in wrong.subject), "")
