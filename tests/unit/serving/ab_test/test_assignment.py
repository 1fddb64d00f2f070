"""Who gets which arm: shares, stickiness, and that only range-edge units move."""

import hashlib
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from graftwork.serving.ab_test.assignment import (
    PARTS,
    Assigner,
    Range,
    apportion,
    first_ranges,
    key_of,
    reweigh,
    without,
)

UNITS = [f"user:{number}" for number in range(20_000)]
KEY = key_of("cards-1a2b3c4d", "")


def assigner(ranges: tuple[Range, ...], key: bytes = KEY, holdout: float = 0.0) -> Assigner:
    return Assigner(key, ranges, control="a", holdout=holdout)


def drawn(one: Assigner) -> list[str]:
    return [one.draw(unit).arm for unit in UNITS]


def test_shares_are_the_weights_and_other_keys_draw_independently() -> None:
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    first = drawn(assigner(first_ranges(weights)))
    found = Counter(first)
    assert chisquare([found[arm] for arm in weights], [weights[arm] * len(UNITS) for arm in weights]).pvalue > 1e-3
    for other in (key_of("cards-1a2b3c4d", "again"), key_of("cards-00000000", "")):
        second = drawn(assigner(first_ranges(weights), other))
        same = sum(x == y for x, y in zip(first, second, strict=True)) / len(UNITS)
        assert same == pytest.approx(0.6**2 + 0.3**2 + 0.1**2, abs=0.015)


def test_a_unit_keeps_its_arm_wherever_it_is_asked() -> None:
    """Pinned to an independent reading of the hash, so that another release or machine draws the same."""
    one = assigner(first_ranges({"a": 0.5, "b": 0.5}))
    digest = hashlib.blake2b(
        b"user:7", digest_size=8, key=hashlib.blake2b(b"cards-1a2b3c4d\0", digest_size=32).digest()
    )
    place = int.from_bytes(digest.digest(), "big") % 1_000_000
    assert one.draw("user:7").arm == ("a" if place < 500_000 else "b")
    assert [one.draw(unit) for unit in UNITS] == [one.draw(unit) for unit in UNITS]


def test_a_ramp_moves_the_edge_alone() -> None:
    before, after = {"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.5}
    ranges = first_ranges(before)
    first, second = drawn(assigner(ranges)), drawn(assigner(reweigh(ranges, after)))
    moved = [(x, y) for x, y in zip(first, second, strict=True) if x != y]
    assert set(moved) == {("a", "b")}, "nobody leaves the arm that grew"
    assert len(moved) / len(UNITS) == pytest.approx(0.4, abs=0.012)  # three standard errors


shares = st.lists(st.integers(0, 1000), min_size=2, max_size=6).filter(any)


@settings(max_examples=200, deadline=None)
@given(st.lists(shares, min_size=2, max_size=5))
def test_any_ramps_move_exactly_the_weight_that_moved(steps: list[list[int]]) -> None:
    arms = "abcdef"[: max(map(len, steps))]
    plans = [dict(zip(arms, [share / sum(step) for share in step] + [0.0] * len(arms), strict=False)) for step in steps]
    ranges = first_ranges(plans[0])
    for weights in plans[1:]:
        old, ranges = ranges, reweigh(ranges, weights)
        have = Counter({arm: 0 for arm in arms})
        for arm, count in ranges:
            have[arm] += count
        assert dict(have) == {arm: apportion(weights).get(arm, 0) for arm in arms}
        assert moved(old, ranges) == sum(max(0, count - parts(old)[arm]) for arm, count in have.items())


def parts(ranges: tuple[Range, ...]) -> Counter[str]:
    found: Counter[str] = Counter()
    for arm, count in ranges:
        found[arm] += count
    return found


def moved(old: tuple[Range, ...], new: tuple[Range, ...]) -> int:
    """Places with another owner, counted by walking both circles."""
    total, left, right = 0, list(old), list(new)
    while left:
        step = min(left[0][1], right[0][1])
        total += step * (left[0][0] != right[0][0])
        for side in (left, right):
            side[0] = (side[0][0], side[0][1] - step)
            if not side[0][1]:
                side.pop(0)
    return total


def test_weights_become_whole_places() -> None:
    assert apportion({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {"a": 333_334, "b": 333_333, "c": 333_333}
    assert sum(apportion({"a": 1e-9, "b": 1 - 1e-9}).values()) == PARTS


def test_a_cut_arm_gives_its_units_to_the_others_in_proportion() -> None:
    weights = without({"a": 0.5, "b": 0.3, "c": 0.2}, "b", "a")
    assert weights == {"a": pytest.approx(5 / 7), "b": 0.0, "c": pytest.approx(2 / 7)}
    assert math.fsum(weights.values()) == pytest.approx(1)
    before = first_ranges({"a": 0.5, "b": 0.3, "c": 0.2})
    first, second = drawn(assigner(before)), drawn(assigner(reweigh(before, weights)))
    assert {x for x, y in zip(first, second, strict=True) if x != y} == {"b"}
    assert "b" not in second
    assert without({"a": 0.0, "b": 1.0}, "b", "a") == {"a": 1.0, "b": 0.0}


def test_held_out_units_get_the_control_and_are_no_part_of_the_draw() -> None:
    one = assigner(first_ranges({"a": 0.5, "b": 0.5}), holdout=0.2)
    held = [unit for unit in UNITS if one.draw(unit).probability is None]
    assert {one.draw(unit).arm for unit in held} == {"a"}
    assert len(held) / len(UNITS) == pytest.approx(0.2, abs=0.01)
    rest = Counter(one.draw(unit).arm for unit in UNITS if one.draw(unit).probability is not None)
    assert chisquare([rest["a"], rest["b"]]).pvalue > 1e-3, "the holdout is drawn independently of the arms"
    assert {one.draw(unit).probability for unit in UNITS} == {None, 0.5}


def test_pseudonyms_hide_the_unit_and_differ() -> None:
    one = assigner(first_ranges({"a": 0.5, "b": 0.5}))
    names = {one.pseudonym(unit) for unit in UNITS}
    assert len(names) == len(UNITS)
    assert all(len(name) == 32 for name in names)
    assert one.pseudonym("user:1") != assigner(first_ranges({"a": 1.0}), key_of("other", "")).pseudonym("user:1")
