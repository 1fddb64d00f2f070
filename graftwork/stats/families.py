"""Many tests at once: adjusted p-values, and groups of arms in place of a ranking that the tests do not bear."""

from collections.abc import Collection, Mapping, Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being tested together (Holm 1979): reject where the adjusted one is below alpha."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that at most a share alpha of what lies below it is false (Benjamini & Hochberg 1995).

    For slices, where a false alarm among many findings costs little; claims take `holm`.
    """
    adjusted, lowest, count = [0.0] * len(p_values), 1.0, len(p_values)
    order = sorted(range(count), key=p_values.__getitem__, reverse=True)
    for rank, index in zip(range(count, 0, -1), order, strict=True):
        lowest = min(lowest, count / rank * p_values[index])
        adjusted[index] = lowest
    return adjusted


def tied_sets(means: Mapping[str, float], apart: Collection[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The largest groups of arms no two of which the tests tell apart, best mean first; `apart`: the pairs they do.

    An arm may stand in several groups: not told apart is not transitive. Insert-and-absorb of compact letter displays
    (Piepho 2004, J Comput Graph Stat 13:456-466).
    """
    unknown = {arm for pair in apart for arm in pair} - set(means)
    assert not unknown, f"no mean of {sorted(unknown)}"
    groups = [frozenset(means)] if means else []
    for pair in apart:
        split = [part for group in groups for part in _without(group, *pair)]
        groups = [one for one in dict.fromkeys(split) if not any(one < other for other in split)]
    ordered = [tuple(sorted(group, key=lambda arm: (-means[arm], arm))) for group in groups]
    return sorted(ordered, key=lambda group: [(-means[arm], arm) for arm in group])


def _without(group: frozenset[str], a: str, b: str) -> list[frozenset[str]]:
    return [group - {a}, group - {b}] if a != b and {a, b} <= group else [group]
