"""Where requests go: the order of preference alone, without Ray. The real thing is in tests/ray/test_replicas.py."""

import random
from collections import Counter

import pytest

from graftwork.serving.router import rank, rendezvous

NAMES = [f"replica{number}" for number in range(8)]
IDLE = dict.fromkeys(NAMES, 0)


def test_a_cold_adapter_has_one_home_and_many_adapters_spread_over_all() -> None:
    homes = Counter(rendezvous(f"task{n}@latest", NAMES)[0] for n in range(4000))
    assert set(homes) == set(NAMES)
    assert max(homes.values()) < 1.2 * 4000 / 8  # binomial: 500 +- 21
    assert rank("card@latest", IDLE, [], free_load=4)[0] == rendezvous("card@latest", reversed(NAMES))[:1]


def test_a_replica_that_goes_moves_only_its_own_adapters() -> None:
    adapters = [f"task{n}@latest" for n in range(1000)]
    before = {adapter: rendezvous(adapter, NAMES)[0] for adapter in adapters}
    after = {adapter: rendezvous(adapter, NAMES[:-1])[0] for adapter in adapters}
    assert {adapter for adapter in adapters if before[adapter] != after[adapter]} == {
        adapter for adapter in adapters if before[adapter] == NAMES[-1]
    }


def test_where_the_adapter_lies_comes_first_two_at_a_time() -> None:
    chance, seen = random.Random(0), set[str]()
    for _ in range(50):
        first, rest = rank("card@latest", IDLE, NAMES[2:6], free_load=4, chance=chance)
        assert len(first) == 2
        assert sorted(first + rest) == NAMES
        seen |= set(first)
    assert seen == set(NAMES[2:6])


@pytest.mark.parametrize(("load", "stays"), [(3, True), (4, False)])
def test_an_overloaded_home_gives_way_to_the_next_of_its_order(load: int, stays: bool) -> None:
    home, second = rendezvous("card@latest", NAMES)[:2]
    first = rank("card@latest", {**IDLE, home: load}, [home], free_load=4)[0]
    assert first == [home if stays else second]


def test_what_everybody_carries_is_no_overload() -> None:
    """The bound follows the mean load: affinity holds when all replicas are busy alike."""
    busy = dict.fromkeys(NAMES, 100)
    assert rank("card@latest", {**busy, NAMES[0]: 120}, NAMES[:1], free_load=4)[0] == NAMES[:1]
    assert rank("card@latest", {**busy, NAMES[0]: 140}, NAMES[:1], free_load=4)[0] != NAMES[:1]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 8])
def test_one_hot_adapter_loads_all_replicas_alike(replicas: int) -> None:
    """All traffic on one adapter, nothing ending: Serve takes the emptiest of the first rank, which then holds it."""
    loads, residents = dict.fromkeys(NAMES[:replicas], 0), set[str]()
    for _ in range(400):
        first = rank("hot@latest", loads, residents, free_load=4, chance=random.Random(1))[0]
        taken = min(first, key=loads.__getitem__)
        loads[taken] += 1
        residents.add(taken)
    assert max(loads.values()) <= 1.25 * 400 / replicas + 2
    assert len(residents) >= replicas / 1.25
