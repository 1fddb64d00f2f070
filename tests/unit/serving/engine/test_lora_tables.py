"""Places of adapters in the tables, however their weights lie in memory."""

from collections.abc import Mapping

import pytest
import torch

from graftwork.serving.engine.adapters.format import LinearShape, SiteWeights
from graftwork.serving.engine.adapters.loaded import GroupWeights, LoadedAdapter
from graftwork.serving.engine.lora_layers import LoraLayer
from graftwork.serving.engine.lora_tables import RankTables

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


def adapter(
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
    first = adapter("first", ADAPTERS["every layer"], one_file=True)
    tables.free(taken(tables, first))
    scaling = {name: 0.5 + number % 3 for number, name in enumerate(sorted(ADAPTERS[kind]))}
    for weights in (
        adapter("b", ADAPTERS[kind], one_file=one_file),
        adapter("cc", ADAPTERS[kind], one_file=one_file, scaling=scaling),
    ):
        check(tables, taken(tables, weights), weights)


def test_a_full_table_takes_no_more() -> None:
    tables = RankTables(BUCKET, groups(), PLACES, torch.float32, torch.device("cpu"))
    for number in range(PLACES):
        taken(tables, adapter("v" * number, ADAPTERS["some layers"], one_file=True))
    assert tables.alloc(adapter("last", ADAPTERS["some layers"], one_file=True)) is None


def taken(tables: RankTables, weights: LoadedAdapter) -> int:
    place = tables.alloc(weights)
    assert place is not None
    return place


def check(tables: RankTables, place: int, weights: LoadedAdapter) -> None:
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
