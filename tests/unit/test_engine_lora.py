"""Every way to compute decoding tokens' deltas says what `x @ A.T @ B.T * scaling` says, row by row."""

from collections.abc import Sequence

import torch

from graftwork.serving.engine.adapters.changes import LinearShape, SiteWeights
from graftwork.serving.engine.lora import DeltaPlanner, StepDeltas
from graftwork.serving.engine.parts import Bagged, Batched, OwnMatmul
from graftwork.serving.engine.sites import Site
from graftwork.serving.engine.slots import AdapterWeights, GroupWeights

WIDTHS = {"q": 24, "k": 8, "v": 8, "o": 24}
IN = 24
GROUPS = {
    "qkv": [Site(name, LinearShape(IN, WIDTHS[name]), "qkv", member) for member, name in enumerate("qkv")],
    "o": [Site("o", LinearShape(IN, WIDTHS["o"]), "o", 0)],
}
SITES = [site for sites in GROUPS.values() for site in sites]


def adapter(seed: int, rank: int = 4, targets: str = "qkvo") -> AdapterWeights:
    """As the slot pool packs one for a CPU."""
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for name, sites in GROUPS.items():
        targeted = [site for site in sites if site.name in targets]
        if not targeted:
            continue
        stack = torch.randn(rank * len(targeted), IN, generator=generator)
        members: list[SiteWeights | None] = []
        starts, start = [], 0
        for site in sites:
            starts.append(start)
            if site not in targeted:
                members.append(None)
                continue
            b_OR = torch.randn(site.shape.out_features, rank, generator=generator)
            members.append(SiteWeights(stack[start : start + rank], b_OR, 0.5 + seed))
            start += rank
        groups[name] = GroupWeights(None, tuple(members), tuple(starts))
    return AdapterWeights(f"v{seed}", rank, groups)


def planner(places: int = 16) -> DeltaPlanner:
    return DeltaPlanner(GROUPS, torch.float32, torch.device("cpu"), places)


def check(planned: StepDeltas | None, rows: Sequence[AdapterWeights | None]) -> None:
    """Runs all four linears on random inputs and holds each row against its own adapter's formula in float64."""
    assert planned is not None
    generator = torch.Generator().manual_seed(9)
    shared, other = (torch.randn(1, len(rows), IN, generator=generator) for _ in range(2))
    for site in SITES:
        x = shared if site.group == "qkv" else other
        out = torch.randn(1, len(rows), site.shape.out_features, generator=generator)
        expected = out.double()
        for row, weights in enumerate(rows):
            part = weights.groups[site.group].members[site.member] if weights and site.group in weights.groups else None
            if part is not None:
                delta = x[0, row].double() @ part.a_RI.double().T @ part.b_OR.double().T
                expected[0, row] += delta * part.scaling
        torch.testing.assert_close(planned.add(site, x, out).double(), expected, rtol=1e-4, atol=1e-3)


def test_neighbours_are_batched() -> None:
    plan, adapters = planner(), [adapter(n) for n in range(5)]
    for one in adapters:
        plan.admit(one)
    for rows in (adapters, adapters[::-1], [*adapters, None, *adapters[1:4], None]):
        planned = plan.plan(rows, [])
        assert planned is not None
        assert [type(part) for part in planned.parts] == [Batched]
        check(planned, rows)


def test_rows_are_ordered_as_their_adapters_lie_and_read_so_in_any_mix() -> None:
    plan, adapters = planner(places=4), [adapter(n, rank=20 if n == 2 else 4) for n in range(6)]
    for one in adapters:  # places: 4 of rank 8, of which the last has none left, and 1 of rank 32
        plan.admit(one)
    assert plan.order([]) is None
    assert plan.order([None, *adapters[:2]]) is None
    rows = [adapters[n] if n < 6 else None for n in (3, 2, 6, 0, 5, 4, 0, 1, 3, 2)]
    order = plan.order(rows)
    assert order is not None
    ordered = [rows[n] for n in order]
    assert [None if one is None else one.version for one in ordered] == [
        None, "v5", "v0", "v0", "v1", "v3", "v3", "v4", "v2", "v2",
    ]  # fmt: skip
    for mix in (rows, ordered, ordered[2:8], [*adapters[:2] * 2, *adapters[3:5]], ordered[1:2] * 3):
        check(plan.plan(mix, []), mix)


def test_scattered_adapters_are_summed_in_bags() -> None:
    plan, adapters = planner(), [adapter(n, targets="qv" if n % 2 else "qkvo") for n in range(12)]
    for one in adapters:
        plan.admit(one)
    rows = [adapters[11], None, adapters[0], adapters[5], adapters[5], None]
    for some in (rows, [one for one in rows if one]):
        planned = plan.plan(some, [])
        assert planned is not None
        assert [type(part) for part in planned.parts] == [Bagged]
        check(planned, some)


def test_rank_buckets_many_rows_and_the_unplaced_stand_side_by_side() -> None:
    plan = planner(places=3)
    small, large, fourth = [adapter(n) for n in range(3)], [adapter(n, rank=12) for n in (7, 8)], adapter(9)
    for one in (*small, *large, fourth):
        plan.admit(one)  # the fourth of rank 4 finds every place taken
    rows = [small[0], large[1], None, fourth, *[small[2]] * 9, small[1], large[0], fourth]
    planned = plan.plan(rows, [])
    assert planned is not None
    assert [type(part) for part in planned.parts] == [OwnMatmul, OwnMatmul, Batched, Batched]
    check(planned, rows)


def test_a_place_is_written_anew_for_its_next_adapter() -> None:
    plan = planner(places=1)
    first, second = adapter(1, rank=8), adapter(2, rank=3, targets="ko")
    plan.admit(first)
    check(plan.plan([first, None], []), [first, None])
    plan.forget(first.version)
    plan.admit(second)
    planned = plan.plan([None, second], [])
    assert planned is not None
    assert [type(part) for part in planned.parts] == [Batched], "it has the freed place"
    check(planned, [None, second])


def test_the_same_rows_are_planned_once_and_others_anew() -> None:
    plan, adapters = planner(), [adapter(n) for n in range(3)]
    for one in adapters:
        plan.admit(one)
    first, again, other = (plan.plan(rows, []) for rows in (adapters[:2], adapters[:2], adapters[1:]))
    assert first is not None
    assert again is not None
    assert first.parts[0] is again.parts[0]
    check(other, adapters[1:])
    assert plan.plan([None, None], []) is None
