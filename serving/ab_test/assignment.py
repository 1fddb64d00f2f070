"""Assignment of units to arms by a keyed hash into ranges: stateless, so it stays the same across restarts.

The circle of PARTS places is owned by arms, range by range. When weights change, an arm that shrinks gives up the ends
of its ranges and an arm that grows takes what was given up: the units that move are the share of weight that moved.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

PARTS = 1_000_000
"""Places of the circle; a weight is rounded to a millionth."""
_HOLDOUT = b"holdout"
Range = tuple[str, int]
"""An arm and how many places in a row it owns."""


def key_of(experiment: str, salt: str) -> bytes:
    """The hash's key: other experiments and salts assign independently."""
    return hashlib.blake2b(f"{experiment}\0{salt}".encode(), digest_size=32).digest()


def first_ranges(weights: Mapping[str, float]) -> tuple[Range, ...]:
    """One range an arm, in the order of the weights."""
    return tuple((arm, count) for arm, count in apportion(weights).items() if count)


def apportion(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights that sum to 1 as whole places that sum to PARTS; what rounding leaves goes to the largest remainders."""
    exact = {arm: weight * PARTS for arm, weight in weights.items()}
    parts = {arm: math.floor(value) for arm, value in exact.items()}
    rest = PARTS - sum(parts.values())
    for arm in sorted(exact, key=lambda arm: parts[arm] - exact[arm])[:rest]:
        parts[arm] += 1
    return parts


def reweigh(ranges: Sequence[Range], weights: Mapping[str, float]) -> tuple[Range, ...]:
    """The ranges for new weights. Only places at the ends of shrinking arms' ranges get another owner."""
    wanted = apportion(weights)
    keep = {arm: wanted.get(arm, 0) for arm, _ in ranges}
    held = {arm: sum(count for owner, count in ranges if owner == arm) for arm in {**keep, **wanted}}
    missing = {arm: count - held[arm] for arm, count in wanted.items() if count > held[arm]}
    moved: list[Range] = []
    for arm, count in ranges:
        kept = min(count, keep[arm])
        keep[arm] -= kept
        moved += [(arm, kept)] if kept else []
        free = count - kept
        for taker in list(missing):
            taken = min(free, missing[taker])
            moved += [(taker, taken)] if taken else []
            free -= taken
            missing[taker] -= taken
    return _join_ranges(moved)


def without(weights: Mapping[str, float], arm: str, heir: str) -> dict[str, float]:
    """Weights with the arm at 0 and the others grown in proportion; where none is left, `heir` has all."""
    rest = math.fsum(weight for name, weight in weights.items() if name != arm)
    if rest <= 0:
        return {name: float(name == heir) for name in weights}
    return {name: 0.0 if name == arm else weight / rest for name, weight in weights.items()}


def _join_ranges(ranges: Sequence[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for arm, count in ranges:
        if joined and joined[-1][0] == arm:
            joined[-1] = (arm, joined[-1][1] + count)
        else:
            joined.append((arm, count))
    return tuple(joined)


@dataclass(frozen=True, slots=True)
class ArmDraw:
    """Arm of a unit. probability: its chance of this arm; None where it is no part of the draw."""

    arm: str
    probability: float | None


class Assigner:
    """One experiment's draw. Build a new one when the ranges change."""

    def __init__(self, key: bytes, ranges: Sequence[Range], *, control: str, holdout: float = 0.0) -> None:
        self._key = key
        self._ends = list(accumulate(count for _, count in ranges))
        assert self._ends[-1:] == [PARTS], f"ranges cover {self._ends[-1:]} of {PARTS} places"
        parts = {arm: sum(count for owner, count in ranges if owner == arm) for arm, _ in ranges}
        self._drawn = [ArmDraw(arm, parts[arm] / PARTS) for arm, _ in ranges]
        self._holdout, self._control = round(holdout * PARTS), ArmDraw(control, None)

    def draw(self, unit: str) -> ArmDraw:
        """The unit's arm."""
        if self._holdout and self._hash_place(unit, _HOLDOUT) < self._holdout:
            return self._control
        return self._drawn[bisect_right(self._ends, self._hash_place(unit))]

    def pseudonym(self, unit: str) -> str:
        """The unit as the log has it: 32 hex digits that tell nothing without the key."""
        return hashlib.blake2b(unit.encode(), key=self._key, person=b"unit", digest_size=16).hexdigest()

    def _hash_place(self, unit: str, person: bytes = b"") -> int:
        digest = hashlib.blake2b(unit.encode(), key=self._key, person=person, digest_size=8).digest()
        return int.from_bytes(digest, "big") % PARTS
