"""Deltas of decoding tokens are `x @ A.T @ B.T * scaling` row by row, however they are computed and stored."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from graftwork.serving.engine.adapters.format import LinearShape, SiteWeights
from graftwork.serving.engine.adapters.loaded import GroupWeights, LoadedAdapter
from graftwork.serving.engine.cpu.kernels import MOST_RANK, Compiled, kernels_for
from graftwork.serving.engine.lora_batch import (
    BatchedMatmulLora,
    DeltaPlanner,
    EmbeddingBagLora,
    RankTables,
    SingleAdapterLora,
)
from graftwork.serving.engine.lora_layers import LoraLayer, LoraSegment, StepDeltas

WIDTHS = {"q": 24, "k": 8, "v": 8, "o": 24}
IN = 24
GROUPS = {
    "qkv": [LoraLayer(name, LinearShape(IN, WIDTHS[name]), "qkv", member) for member, name in enumerate("qkv")],
    "o": [LoraLayer("o", LinearShape(IN, WIDTHS["o"]), "o", 0)],
}
SITES = [site for sites in GROUPS.values() for site in sites]


def adapter(
    seed: int, rank: int = 4, targets: str = "qkvo", dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> LoadedAdapter:
    """As the slot pool packs one for a CPU."""
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for name, sites in GROUPS.items():
        targeted = [site for site in sites if site.name in targets]
        if not targeted:
            continue
        stack = (scale * torch.randn(rank * len(targeted), IN, generator=generator)).to(dtype)
        members: list[SiteWeights | None] = []
        starts, start = [], 0
        for site in sites:
            starts.append(start)
            if site not in targeted:
                members.append(None)
                continue
            b_OR = torch.randn(site.shape.out_features, rank, generator=generator).to(dtype)
            members.append(SiteWeights(stack[start : start + rank], b_OR, 0.5 + seed))
            start += rank
        groups[name] = GroupWeights(None, tuple(members), tuple(starts))
    return LoadedAdapter(f"v{seed}", rank, groups)


def planner(places: int = 16) -> DeltaPlanner:
    return DeltaPlanner(GROUPS, torch.float32, torch.device("cpu"), places)


def check(
    planned: StepDeltas | None,
    rows: Sequence[LoadedAdapter | None],
    dtype: torch.dtype = torch.float32,
    rtol: float = 1e-4,
    atol: float = 1e-3,
) -> None:
    """Runs all four linears on random inputs and holds each row against its own adapter's formula in float64."""
    assert planned is not None
    generator = torch.Generator().manual_seed(9)
    shared, other = (torch.randn(1, len(rows), IN, generator=generator).to(dtype) for _ in range(2))
    for site in SITES:
        x = shared if site.group == "qkv" else other
        out = torch.randn(1, len(rows), site.shape.out_features, generator=generator).to(dtype)
        expected = out.double()
        for row, weights in enumerate(rows):
            part = weights.groups[site.group].members[site.member] if weights and site.group in weights.groups else None
            if part is not None:
                delta = x[0, row].double() @ part.a_RI.double().T @ part.b_OR.double().T
                expected[0, row] += delta * part.scaling
        torch.testing.assert_close(planned.add(site, x, out).double(), expected, rtol=rtol, atol=atol)


def test_neighbours_are_batched() -> None:
    plan, adapters = planner(), [adapter(n) for n in range(5)]
    for one in adapters:
        plan.admit(one)
    for rows in (adapters, adapters[::-1], [*adapters, None, *adapters[1:4], None]):
        planned = plan.plan(rows, [])
        assert planned is not None
        assert [type(part) for part in planned.parts] == [BatchedMatmulLora]
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
        None,
        "v5",
        "v0",
        "v0",
        "v1",
        "v3",
        "v3",
        "v4",
        "v2",
        "v2",
    ]
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
        assert [type(part) for part in planned.parts] == [EmbeddingBagLora]
        check(planned, some)


def test_rank_buckets_many_rows_and_the_unplaced_stand_side_by_side() -> None:
    plan = planner(places=3)
    small, large, fourth = [adapter(n) for n in range(3)], [adapter(n, rank=12) for n in (7, 8)], adapter(9)
    for one in (*small, *large, fourth):
        plan.admit(one)  # the fourth of rank 4 finds every place taken
    rows = [small[0], large[1], None, fourth, *[small[2]] * 9, small[1], large[0], fourth]
    planned = plan.plan(rows, [])
    assert planned is not None
    assert [type(part) for part in planned.parts] == [
        SingleAdapterLora,
        SingleAdapterLora,
        BatchedMatmulLora,
        BatchedMatmulLora,
    ]
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
    assert [type(part) for part in planned.parts] == [BatchedMatmulLora], "it has the freed place"
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


needs_kernels = pytest.mark.skipif(kernels_for(torch.float32) is None, reason="needs a C compiler and AVX-512")


def compiled(dtype: torch.dtype = torch.float32) -> DeltaPlanner:
    return DeltaPlanner(GROUPS, dtype, torch.device("cpu"), kernels=kernels_for(dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 7, 8, 12, 16, 20, 32, 48])
def test_the_kernel_adds_what_the_formula_says(rank: int, dtype: torch.dtype) -> None:
    plan = compiled(dtype)
    adapters = [adapter(n, rank, "qv" if n % 2 else "qkvo", dtype, 1 / IN) for n in range(5)]
    for one in adapters:
        plan.admit(one)
    rows = [adapters[3], None, adapters[0], adapters[4], adapters[0], None, adapters[1]]
    close = (1e-4, 1e-4) if dtype == torch.float32 else (2**-7, 2**-7)  # half a unit of the result's last place
    for some in (rows, rows[2:3], [one for one in rows if one]):
        planned = plan.plan(some, [])
        assert planned is not None
        assert [type(part) for part in planned.parts] == [Compiled]
        check(planned, some, dtype, *close)


@needs_kernels
def test_the_kernel_takes_ranks_of_all_sizes_at_once_and_leaves_many_rows_to_products() -> None:
    plan = compiled()
    adapters = [adapter(0, 4), adapter(1, 64), adapter(2, 16, "o"), adapter(3, 8)]
    for one in adapters:
        plan.admit(one)
    assert plan.order(adapters) is None
    rows = [*adapters[:3], *[adapters[3]] * 40, None, *adapters[:3]]
    planned = plan.plan(rows, [])
    assert planned is not None
    assert [type(part) for part in planned.parts] == [SingleAdapterLora, Compiled]
    check(planned, rows)


@needs_kernels
def test_what_the_kernel_cannot_read_as_it_lies_has_products_of_its_own() -> None:
    plan = compiled()
    wide, turned = adapter(0, MOST_RANK + 1), adapter(1)
    stack = torch.randn(4, IN).t().contiguous().t()
    turned.groups["o"].members[0].__dict__["a_RI"] = stack  # frozen; a layout that no file has
    for one in (wide, turned):
        plan.admit(one)
    planned = plan.plan([wide, turned], [])
    assert planned is not None
    assert [type(part) for part in planned.parts] == [SingleAdapterLora, SingleAdapterLora]
    check(planned, [wide, turned], rtol=1e-3)


@needs_kernels
def test_a_forgotten_adapter_is_not_read_again() -> None:
    plan, first, second = compiled(), adapter(1, 8), adapter(2, 3, "ko")
    plan.admit(first)
    check(plan.plan([first, None], []), [first, None])
    plan.forget(first.version)
    plan.admit(second)
    planned = plan.plan([first, second], [])
    assert planned is not None
    assert [type(part) for part in planned.parts] == [SingleAdapterLora, Compiled]
    check(planned, [first, second])


@needs_kernels
def test_the_kernel_reads_16_bit_adapters_beside_those_of_the_engines_type() -> None:
    plan = compiled()
    adapters = [
        adapter(n, rank, dtype=torch.bfloat16 if n % 2 else torch.float32) for n, rank in enumerate((8, 16, 5, 4))
    ]
    for one in adapters:
        plan.admit(one)
    rows = [adapters[1], None, *adapters, *[adapters[1]] * 20]  # and one by products of its own
    for some in (rows, rows[:6]):
        check(plan.plan(some, []), some)
    segments = [LoraSegment(0, 3, adapters[3]), LoraSegment(3, 5, adapters[0])]  # prompts
    check(plan.plan([], segments), [adapters[3]] * 3 + [adapters[0]] * 2)


LAYERS, BUCKET, PLACES = 12, 8, 3
QK, DOWN = ("q", "k"), ("down",)
SHAPES = {"q": LinearShape(6, 10), "k": LinearShape(6, 4), "down": LinearShape(14, 6)}


def groups() -> dict[str, list[LoraLayer]]:
    """Two linears with one input and one alone, in each layer."""
    return {
        f"layers.{layer}.{'+'.join(names)}": [
            LoraLayer(f"layers.{layer}.{name}", SHAPES[name], f"layers.{layer}.{'+'.join(names)}", member)
            for member, name in enumerate(names)
        ]
        for layer in range(LAYERS)
        for names in (QK, DOWN)
    }


def table_adapter(
    version: str, ranks: Mapping[str, int], *, one_file: bool, scaling: Mapping[str, float] | None = None
) -> LoadedAdapter:
    """Random halves of the named linears; in one buffer, in order of their names as in a file, or each by itself."""
    generator = torch.Generator().manual_seed(len(version) + sum(ranks.values()))
    sites = {site.name: site for members in groups().values() for site in members}
    buffer, start, parts = torch.randn(20_000, generator=generator), 0, {}
    for name in sorted(ranks):
        halves: list[torch.Tensor] = []
        for shape in ((ranks[name], sites[name].shape.in_features), (sites[name].shape.out_features, ranks[name])):
            size = shape[0] * shape[1]
            half = buffer[start : start + size].view(shape)
            halves.append(half if one_file else half.clone())
            start += -(-size // 16) * 16
        parts[name] = SiteWeights(halves[0], halves[1], (scaling or {}).get(name, 0.7))
    grouped = {
        group: GroupWeights(None, tuple(parts.get(site.name) for site in members), (0,) * len(members))
        for group, members in groups().items()
        if any(site.name in parts for site in members)
    }
    return LoadedAdapter(version, max(ranks.values()), grouped)


def names(*kinds: str, layers: range = range(LAYERS)) -> list[str]:
    return [f"layers.{layer}.{kind}" for layer in layers for kind in kinds]


ADAPTERS = {
    "every layer": dict.fromkeys(names("q", "k", "down"), 8),
    "a smaller rank": dict.fromkeys(names("q", "k", "down"), 5),
    "one linear of a group": dict.fromkeys(names("k"), 8),
    "some layers": dict.fromkeys(names("q", "down", layers=range(3, 11, 2)), 8),
    "ranks of their own": {name: 3 + number % 5 for number, name in enumerate(names("q", "down"))},
}


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_place_holds_the_adapter_and_zeros_where_it_changes_nothing(kind: str, one_file: bool) -> None:
    tables = RankTables(BUCKET, groups(), PLACES, torch.float32, torch.device("cpu"))
    first = table_adapter("first", ADAPTERS["every layer"], one_file=True)
    tables.free(taken(tables, first))
    scaling = {name: 0.5 + number % 3 for number, name in enumerate(sorted(ADAPTERS[kind]))}
    for weights in (
        table_adapter("b", ADAPTERS[kind], one_file=one_file),
        table_adapter("cc", ADAPTERS[kind], one_file=one_file, scaling=scaling),
    ):
        check_place(tables, taken(tables, weights), weights)


def test_a_full_table_takes_no_more() -> None:
    tables = RankTables(BUCKET, groups(), PLACES, torch.float32, torch.device("cpu"))
    for number in range(PLACES):
        taken(tables, table_adapter("v" * number, ADAPTERS["some layers"], one_file=True))
    assert tables.alloc(table_adapter("last", ADAPTERS["some layers"], one_file=True)) is None


def taken(tables: RankTables, weights: LoadedAdapter) -> int:
    place = tables.alloc(weights)
    assert place is not None
    return place


def check_place(tables: RankTables, place: int, weights: LoadedAdapter) -> None:
    for group, members in groups().items():
        for site in members:
            parts = weights.groups.get(group)
            part = parts.members[site.member] if parts else None
            rank = part.rank if part else 0
            a_IR = tables.a(group)[place, :, site.member * BUCKET :][:, :BUCKET]
            b_RO = tables.b(site)[place]
            assert not a_IR[:, rank:].any()
            assert not b_RO[rank:].any()
            if part is not None:
                assert torch.equal(a_IR[:, :rank], part.a_RI.t())
                assert torch.equal(b_RO[:rank], part.b_OR.t() * part.scaling)
