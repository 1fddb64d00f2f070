"""Key-value memory: rows keep their content whatever moves around them; cached prefixes are exact copies."""

import random

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.serving.engine.kv_cache import BLOCK, KvRow, KvShape, KvStore, PrefixCache, block_keys

SHAPES = [KvShape(2, 4), KvShape(1, 8)]
CPU = torch.device("cpu")


def store(tokens: int = 2048, max_len: int = 256) -> KvStore:
    return KvStore(SHAPES, tokens, max_len, torch.float32, CPU)


def write(kv: KvStore, row: KvRow, start: int, stop: int, mark: float) -> None:
    """Fills positions with numbers that tell request, layer, head and position apart."""
    for layer, shape in enumerate(kv.shapes):
        for half, view in enumerate(kv.row_view(row, layer)):
            place = torch.arange(start, stop)[None, :, None] + 1000.0 * torch.arange(shape.heads)[:, None, None]
            view[:, start:stop] = place + 10_000 * layer + 100_000 * half + 1e6 * mark
    row.length = stop


def content(kv: KvStore, row: KvRow) -> list[torch.Tensor]:
    return [view[:, : row.length].clone() for layer in range(len(SHAPES)) for view in kv.row_view(row, layer)]


def expected(length: int, mark: float) -> list[torch.Tensor]:
    fresh = store(512)
    row = fresh.allocate(length)
    assert row is not None
    write(fresh, row, 0, length, mark)
    return content(fresh, row)


@pytest.mark.parametrize("seed", range(6))
def test_rows_keep_their_content_through_growth_gaps_and_pressure(seed: int) -> None:
    rng = random.Random(seed)
    kv = store(1536)
    rows: dict[int, KvRow] = {}
    refused = 0
    for step in range(600):
        action = rng.random()
        if action < 0.35:
            length = rng.randint(1, 200)
            row = kv.allocate(length + rng.randint(0, 32))
            refused += row is None
            if row is not None:
                write(kv, row, 0, length, step)
                rows[step] = row
        elif action < 0.7 and rows:
            mark = rng.choice(list(rows))
            target = min(256, rows[mark].length + rng.randint(1, 60))
            if kv.grow(rows[mark], target):
                write(kv, rows[mark], rows[mark].length, target, mark)
        elif action < 0.9 and rows:
            kv.free(rows.pop(rng.choice(list(rows))))
        else:
            kv.close_gaps()
        places = [(row.page, row.index) for row in rows.values()]
        assert len(set(places)) == len(places)
        assert kv.used_tokens == sum(row.length for row in rows.values()) <= kv.capacity
    assert refused > 0, "the test should run out of memory at times"
    for mark, row in rows.items():
        assert all(map(torch.equal, content(kv, row), expected(row.length, mark)))


def test_a_lone_row_can_always_grow_to_the_longest_length() -> None:
    kv = store(300, max_len=256)
    row = kv.allocate(10)
    assert row is not None
    write(kv, row, 0, 10, 1)
    for length in range(11, 257):
        assert kv.grow(row, length)
        write(kv, row, length - 1, length, 1)
    assert all(map(torch.equal, content(kv, row), expected(256, 1)))


def test_neighbouring_rows_are_one_view() -> None:
    kv = store()
    rows = [kv.allocate(60) for _ in range(3)]
    for n, row in enumerate(rows):
        assert row is not None
        assert (row.page, row.index) == (rows[0].page, n)  # type: ignore[union-attr]
        write(kv, row, 0, 60, n)
    assert rows[0] is not None
    keys, values = kv.run_view(rows[0], 3, 0, 60)
    assert keys.shape == (3 * SHAPES[0].heads, 60, SHAPES[0].head_dim)
    for n, row in enumerate(rows):
        assert row is not None
        own_keys, own_values = kv.row_view(row, 0)
        assert torch.equal(keys.view(3, 2, 60, 4)[n], own_keys[:, :60])
        assert torch.equal(values.view(3, 2, 60, 4)[n], own_values[:, :60])


def test_memory_for_not_even_one_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_tokens"):
        store(100, max_len=256)


def test_a_wiped_row_leaves_nothing_behind() -> None:
    kv = store()
    row = kv.allocate(50)
    assert row is not None
    write(kv, row, 0, 50, float("nan"))
    kv.free(row, wipe=True)
    assert all(torch.isfinite(arena).all() for arena in (*kv.keys, *kv.values))


def test_block_keys_tell_adapters_tokens_and_positions_apart() -> None:
    tokens = list(range(100, 100 + 3 * BLOCK))
    keys = block_keys("v1", tokens)
    assert len(keys) == 3
    assert block_keys("v1", tokens + [5]) == keys
    assert block_keys("v1", tokens[:-1]) == keys[:2]
    assert not set(keys) & set(block_keys("v2", tokens))
    assert not set(keys) & set(block_keys(None, tokens))
    assert not set(keys[1:]) & set(block_keys("v1", [1, *tokens[1:]]))
    assert block_keys("v1", tokens, "ann") == block_keys("v1", tokens, "ann")
    assert not set(block_keys("v1", tokens, "ann")) & {*keys, *block_keys("v1", tokens, "bob")}
    assert block_keys(None, [1, 23] * 8) != block_keys(None, [12, 3] * 8)


def test_a_cached_prefix_is_an_exact_copy_and_the_oldest_goes_first() -> None:
    kv = store()
    cache = PrefixCache(kv, 4 * BLOCK)
    row, other = kv.allocate(64), kv.allocate(64)
    assert row is not None
    assert other is not None
    write(kv, row, 0, 40, 1)
    first = block_keys("v1", list(range(40)))
    cache.insert(first, row, "v1")
    assert (cache.match(first), cache.tokens) == (2, 2 * BLOCK)
    cache.fetch(first, other)
    assert all(map(torch.equal, content(kv, other), expected(2 * BLOCK, 1)))
    write(kv, other, 0, 48, 2)
    second = block_keys("v2", list(range(48)))
    cache.insert(second, other, "v2")
    assert (cache.match(second), cache.match(first)) == (3, 1), "the end of the older prompt made room"
    cache.drop("v2")
    assert (cache.match(second), cache.match(first)) == (0, 1)


def test_a_prompt_longer_than_the_cache_is_kept_in_part() -> None:
    kv = store()
    cache = PrefixCache(kv, 2 * BLOCK)
    row = kv.allocate(100)
    assert row is not None
    write(kv, row, 0, 100, 1)
    keys = block_keys(None, list(range(100)))
    cache.insert(keys, row, None)
    assert cache.match(keys) == 2


def test_a_prompt_that_cannot_be_copied_into_the_cache_costs_it_no_blocks() -> None:
    kv = store()
    cache = PrefixCache(kv, 8 * BLOCK)
    row = kv.allocate(4 * BLOCK)
    assert row is not None
    with pytest.raises(RuntimeError):  # the row has 4 blocks
        cache.insert(block_keys("v1", range(5 * BLOCK)), row, "v1")
    assert cache.tokens == 0
    longer = kv.allocate(8 * BLOCK)
    assert longer is not None
    write(kv, longer, 0, 8 * BLOCK, 1)
    cache.insert(block_keys("v1", range(8 * BLOCK)), longer, "v1")
    assert cache.tokens == 8 * BLOCK
