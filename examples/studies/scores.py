"""Scores of every arm on every question of a measure, and their means over independent units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graftwork import stats
from graftwork.stats import Floats, Interval


@dataclass(frozen=True)
class Scores:
    """Scores by arm and metric, one a question, questions in the same order for all."""

    values: Mapping[str, Mapping[str, Floats]]
    units: Sequence[str]
    """Of each question: what is independent, the question itself or its document."""
    groups: Sequence[str]
    """Of each question: its group, empty where the measure has none."""

    def of(self, group: str | int | None) -> "Scores":
        """The questions of one group; all where None. Raises AssertionError for a group that has none."""
        if group is None:
            return self
        kept = np.array([one == str(group) for one in self.groups])
        assert kept.any(), f"no question in group {group!r}; groups are {sorted(set(self.groups))}"
        values = {arm: {name: found[kept] for name, found in scores.items()} for arm, scores in self.values.items()}
        units = [unit for unit, keep in zip(self.units, kept, strict=True) if keep]
        return replace(self, values=values, units=units, groups=[str(group)] * len(units))

    def per_unit(self, arm: str, metric: str) -> Floats:
        """Mean score of each unit, in the order in which they first come."""
        sums, sizes = stats.cluster_sums(self.values[arm][metric], self.units)
        return sums / sizes

    @property
    def several(self) -> bool:
        """Units have several questions each."""
        return len(set(self.units)) < len(self.units)

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups, sorted; none where the measure has none."""
        return tuple(sorted({group for group in self.groups if group}))


def mean_interval(values: Floats, alpha: float, *, lowest: float, several: bool, seed: int) -> Interval:
    """Interval of a mean over units; `several`: a unit has several questions, so units are few and need wider ones."""
    if several:
        return stats.cluster_bootstrap(values, range(len(values)), alpha, lowest=lowest, seed=seed)
    return stats.bca_mean(values, alpha, lowest=lowest, seed=seed)
