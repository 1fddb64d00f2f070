"""The GPU kernels against plain torch, over shapes that divide by nothing. In Triton's interpreter without a GPU."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import linear

from graftwork.serving.engine.adapters.format import LinearShape, SiteWeights
from graftwork.serving.engine.adapters.loaded import GroupWeights, LoadedAdapter
from graftwork.serving.engine.attention import Chunk
from graftwork.serving.engine.cuda.graph_decode import StepInputs
from graftwork.serving.engine.cuda.kernels import attention, lora
from graftwork.serving.engine.cuda.lora import ROWS, SlotTable, tiled
from graftwork.serving.engine.kv_cache import KvRow, KvShape, KvStore
from graftwork.serving.engine.lora_layers import LoraLayer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
MAX_RANK = 64


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# -- attention --------------------------------------------------------------------------------------------------------


class Rows:
    """A KV store of one layer with requests of given lengths, and the step's inputs that point to them."""

    def __init__(self, lengths: Sequence[int], heads: int, size: int, dtype: torch.dtype, padded: int) -> None:
        self.kv = KvStore([KvShape(heads, size)], 4096, 512, dtype, DEVICE)
        self.rows = [self._row(length, seed) for seed, length in enumerate(lengths)]
        self.inputs = StepInputs(padded, DEVICE)
        chunks = [Chunk([7], length - 1, row) for length, row in zip(lengths, self.rows, strict=True)]
        self.inputs.fill(chunks, [-1] * len(chunks), padded)

    def _row(self, length: int, seed: int) -> KvRow:
        row = self.kv.allocate(length)
        assert row is not None
        for n, view in enumerate(self.kv.row_view(row, 0)):
            view[:, : length - 1] = rand(view.shape[0], length - 1, view.shape[2], seed=2 * seed + n, dtype=view.dtype)
        return row


def reference(
    q_HD: torch.Tensor,
    keys_KSD: torch.Tensor,
    values_KSD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query over all keys, in float64. sinks_H: scores without values, as gpt-oss has them."""
    first = max(0, keys_KSD.shape[1] - window) if window is not None else 0
    repeat = len(q_HD) // len(keys_KSD)
    keys, values = (part[:, first:].double().repeat_interleave(repeat, 0) for part in (keys_KSD, values_KSD))
    scores = torch.einsum("hd,hsd->hs", q_HD.double(), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if sinks_H is not None:
        shares = torch.cat([scores, sinks_H.double()[:, None]], -1).softmax(-1)[:, :-1]
        return torch.einsum("hs,hsd->hd", shares, values)
    return torch.einsum("hs,hsd->hd", scores.softmax(-1), values)


CASES = [  # lengths, query heads, key-value heads, head size, window, softcap
    ([1, 64, 65, 130], 2, 1, 16, None, None),
    ([200], 6, 2, 80, None, None),
    ([1, 300, 17], 8, 1, 64, 24, None),
    ([90, 3], 2, 2, 128, None, 30.0),
    ([129, 64, 1], 9, 3, 64, 100, 20.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_ragged_requests_equals_the_definition(
    case: tuple[list[int], int, int, int, int | None, float | None], with_sinks: bool, dtype: torch.dtype
) -> None:
    lengths, heads, kv_heads, size, window, softcap = case
    sinks_H = 2 * rand(heads, seed=94, dtype=dtype) if with_sinks else None
    padded = len(lengths) + 2
    rows = Rows(lengths, kv_heads, size, dtype, padded)
    q_NHD = rand(heads, padded, size, seed=91, dtype=dtype).transpose(0, 1)  # strided, as the model hands it over
    k_NKD, v_NKD = (rand(padded, kv_heads, size, seed=seed, dtype=dtype) for seed in (92, 93))
    keys, values = rows.kv.keys[0], rows.kv.values[0]
    before = keys.clone()
    attention.write_kv(keys, values, k_NKD, v_NKD, rows.inputs.places(padded))
    assert int((keys != before).any(1).sum()) == len(lengths) * kv_heads, (
        "one line a head and request, none for padding"
    )
    split_NHD, whole_NHD = (
        attention.attend(
            q_NHD,
            keys,
            values,
            kv_heads,
            rows.inputs.places(padded),
            longest=longest,
            scale=0.2,
            window=window,
            softcap=softcap,
            sinks_H=sinks_H,
        )
        for longest in (512, 1)  # sets the number of parts and nothing else: several, then one
    )
    bound = 5e-6 if dtype == torch.float32 else 2e-2
    for n, (length, row) in enumerate(zip(lengths, rows.rows, strict=True)):
        k_KSD, v_KSD = (view[:, :length] for view in rows.kv.row_view(row, 0))
        assert torch.equal(k_KSD[:, -1], k_NKD[n])
        assert torch.equal(v_KSD[:, -1], v_NKD[n])
        expected = reference(q_NHD[n], k_KSD, v_KSD, 0.2, window, softcap, sinks_H)
        for out_NHD in (split_NHD, whole_NHD):
            torch.testing.assert_close(out_NHD[n].double(), expected, atol=bound, rtol=bound)
    assert torch.isfinite(split_NHD).all(), "padding must not make nan"
    assert torch.isfinite(whole_NHD).all()


def test_a_request_is_attended_alike_whoever_stands_beside_it() -> None:
    q_NHD, k_NKD = rand(4, 4, 16, seed=5), rand(4, 2, 16, seed=6)
    results = []
    for lengths in ([70], [70, 9, 200, 31]):
        count, rows = len(lengths), Rows(lengths, 2, 16, torch.float32, len(lengths))
        arenas, places = (rows.kv.keys[0], rows.kv.values[0]), rows.inputs.places(count)
        attention.write_kv(*arenas, k_NKD[:count], k_NKD[:count], places)
        out = attention.attend(q_NHD[:count], *arenas, 2, places, longest=1, scale=0.25, window=None, softcap=None)
        results.append(out[0])
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("programs", "longest", "parts"), [(512, 1024, 1), (8, 1024, 8), (8, 128, 1), (1, 32_768, 256), (512, 8192, 4)]
)
def test_keys_are_split_for_the_device_and_for_long_requests(programs: int, longest: int, parts: int) -> None:
    assert attention.split_count(programs, longest) == parts


# -- lora -------------------------------------------------------------------------------------------------------------

INPUTS, OUTPUTS = 272, (150, 64, 33)
GROUP = [
    LoraLayer(f"m.{name}", LinearShape(INPUTS, out), "m.qkv", n)
    for n, (name, out) in enumerate(zip("qkv", OUTPUTS, strict=True))
]


def adapter(version: str, ranks: Sequence[int], seed: int, dtype: torch.dtype) -> LoadedAdapter:
    """An adapter of the group; a member of rank 0 is not adapted."""
    stack = rand(sum(ranks), INPUTS, seed=seed, dtype=dtype)
    members: list[SiteWeights | None] = []
    starts = [sum(ranks[:n]) for n in range(len(ranks))]
    for n, (rank, start) in enumerate(zip(ranks, starts, strict=True)):
        b_OR = rand(OUTPUTS[n], rank, seed=seed + 50 + n, dtype=dtype)
        members.append(SiteWeights(stack[start : start + rank], b_OR, 0.3 + n) if rank else None)
    groups = {"m.qkv": GroupWeights(stack, tuple(members), tuple(starts))} if any(ranks) else {}
    return LoadedAdapter(version, max(ranks), groups)


def peft_delta(result: torch.Tensor, x: torch.Tensor, part: SiteWeights) -> torch.Tensor:
    """peft 0.21's `result + lora_B(lora_A(x)) * scaling`, every product summed in float32 and rounded to x's dtype."""
    shrunk = linear(x.float(), part.a_RI.float()).to(x.dtype)
    delta = linear(shrunk.float(), part.b_OR.float()).to(x.dtype) * part.scaling
    return result + delta


RANKS = [(8, 8, 8), (16, 0, 16), (5, 12, 64), (0, 0, 0), (33, 1, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[0], [-1, 0, 1], [2, 2, 2, -1, 4, 3, 0], [1] * 19 + [-1] + [0] * 2], ids=str)
def test_deltas_of_mixed_ranks_equal_pefts(rows: list[int], dtype: torch.dtype) -> None:
    adapters = [adapter(f"v{n}", ranks, 7 * n, dtype) for n, ranks in enumerate(RANKS)]
    table = SlotTable({"m.qkv": GROUP}, 32, MAX_RANK, dtype, DEVICE)
    own = [None if n < 0 else adapters[n] for n in rows]
    padded = len(rows) + 3
    inputs = StepInputs(padded, DEVICE)
    row = KvRow(0, 0, 64, 0)
    inputs.fill([Chunk([1], 0, row)] * len(rows), table.slots(own), padded)
    x = rand(padded, INPUTS, seed=70, dtype=dtype)
    partial = lora.shrink(x, inputs.tiles(padded), table, table.groups["m.qkv"])
    for site in GROUP:
        before = rand(padded, site.shape.out_features, seed=71, dtype=dtype)
        out = before.clone()
        lora.expand(partial, inputs.tiles(padded), table, table.sites[site.name], out)
        for n in range(padded):
            weights = own[n] if n < len(rows) else None
            part = weights.groups["m.qkv"].members[site.member] if weights and weights.groups else None
            if part is None:
                assert torch.equal(out[n], before[n]), "a row without this adapter is left alone"
                continue
            expected = peft_delta(before[n], x[n], part)
            atol, rtol = (1e-4, 1e-5) if dtype == torch.float32 else (0.5, 8e-3)
            torch.testing.assert_close(out[n], expected, atol=atol, rtol=rtol)
            if dtype == torch.bfloat16:
                assert float((out[n] == expected).float().mean()) > 0.9, "same roundings, so mostly the same bits"


def test_a_slot_is_rewritten_where_an_adapter_gives_way_to_another() -> None:
    first, second, third = (adapter(f"v{n}", (8, 8, 8), n, torch.float32) for n in range(3))
    table = SlotTable({"m.qkv": GROUP}, 2, MAX_RANK, torch.float32, DEVICE)
    address, old = table.entries.data_ptr(), table.slots([first, None, second])
    assert old == [0, -1, 1]
    assert table.slots([second, third, second]) == [1, 0, 1], "the one that does not decode now gives its slot"
    assert table.slots([third]) == [0]
    table.forget("v1")
    assert table.slots([first]) == [1], "a freed adapter's slot is the next one's"
    assert table.entries.data_ptr() == address
    stack = first.groups["m.qkv"].a_RI
    assert stack is not None
    assert int(table.entries[1, 0]) == stack.data_ptr()


def test_tiles_hold_one_adapter_each_and_every_adapted_row_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        slots = [rng.choice([-1, 0, 0, 0, 0, 5, 9]) for _ in range(rng.randint(0, 70))]
        tiles = tiled(slots)
        assert sorted(row for _, rows in tiles for row in rows) == [n for n, slot in enumerate(slots) if slot >= 0]
        assert all(slots[row] == slot for slot, rows in tiles for row in rows)
        assert all(0 < len(rows) <= ROWS for _, rows in tiles)
        assert len(tiles) <= len(slots)
