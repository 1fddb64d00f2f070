"""Key-value memory: one arena per layer, cut into pages of equal size; a page holds rows of one length class.

A row (one request's keys and values) is contiguous per head, so attention reads it in place:

    arena[layer]   [tokens * Hkv, D]
    a page         page_tokens * Hkv consecutive lines of it, at `page * page_tokens * Hkv`
    rows of a page [rows, Hkv, cap, D]; `cap` (the class) is set when the first row moves in, given back with the last

Neighbouring rows of one page are one strided view with no copy. A row that outgrows its class is copied to a longer
one: a token is copied about once over the life of a request. Equal pages mean no fragmentation between classes.
A block of 16 tokens of a prompt is shared by its key (salt, adapter version, all tokens up to its end): requests of two
adapters, versions or salts never share KV.
Legend: L length, D head size.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch

from graftwork.errors import ConfigError
from graftwork.serving.engine.adapters.format import VirtualTokens
from graftwork.serving.engine.cpu.host_tuning import new_zeros

_PAGE_TOKENS = 4096
_SMALLEST_CLASS = 64


@dataclass(frozen=True)
class KvShape:
    """Key-value heads and head size of one layer."""

    heads: int
    head_dim: int


@dataclass(eq=False)
class KvRow:
    """The place of one request's keys and values. `length` tokens of it are written.

    start: its first token in an arena; head h, position p of a layer is line `start * heads + h * cap + p`.
    """

    page: int
    index: int
    cap: int
    start: int
    length: int = 0


@dataclass(eq=False)
class _Page:
    number: int
    cap: int = 0
    used: int = 0
    rows: list[KvRow | None] = field(default_factory=list)


class KvStore:
    """Allocates rows and owns their memory. Not thread-safe: the engine's thread alone uses it.

    tokens: memory over all rows; max_len: longest row; raises ConfigError where not even one such row fits.
    """

    def __init__(
        self, shapes: Sequence[KvShape], tokens: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if tokens < max_len:
            found, rule = f"room for {tokens} tokens in rows", f"one request of max_seq_len={max_len} tokens fits"
            raise ConfigError("engine.kv_tokens", found, rule, "raise engine.kv_tokens or lower engine.max_seq_len")
        self.shapes = tuple(shapes)
        self.page_tokens = max(max_len, min(_PAGE_TOKENS, tokens // 8))
        self.classes = _classes(max_len)
        self._pages = [_Page(number) for number in range(tokens // self.page_tokens)]
        sizes = [(self.capacity * shape.heads, shape.head_dim) for shape in shapes]
        self.keys = [new_zeros(size, dtype, device) for size in sizes]  # masked lines must be finite
        self.values = [new_zeros(size, dtype, device) for size in sizes]

    @property
    def capacity(self) -> int:
        """Tokens of all pages."""
        return len(self._pages) * self.page_tokens

    @property
    def used_tokens(self) -> int:
        """Tokens written in live rows."""
        return sum(row.length for page in self._pages for row in page.rows if row is not None)

    def allocate(self, tokens: int) -> KvRow | None:
        """A row with room for `tokens` (at most max_len), or None while there is none.

        In the fullest page of the class, then in a free page, then in a gap of a longer class.
        """
        classes = [cap for cap in self.classes if cap >= tokens]
        for cap in (classes[0], 0, *classes[1:]):
            pages = [page for page in self._pages if page.cap == cap and page.used < self.page_tokens // (cap or 1)]
            if pages:
                page = max(pages, key=lambda candidate: candidate.used)
                page.cap = page.cap or classes[0]
                return self._take(page, page.rows.index(None) if None in page.rows else len(page.rows))
        return self.allocate(tokens) if self._defragment() else None  # in the page that this has emptied

    def grow(self, row: KvRow, tokens: int) -> bool:
        """Makes room for `tokens` in the row, moving it if needed. False: no room; the row is unchanged."""
        if tokens <= row.cap:
            return True
        target = self.allocate(tokens)
        if target is not None:
            self._move(row, target)
            return True
        if self._pages[row.page].used == 1:
            self._extend_page(row, tokens)
            return True
        return False

    def free(self, row: KvRow, *, wipe: bool = False) -> None:
        """Gives the row back. wipe: clear it, for it may hold inf or nan, which no mask hides from the next reader."""
        if wipe:
            for layer in range(len(self.shapes)):
                for view in self.row_view(row, layer):
                    view.zero_()
        page = self._pages[row.page]
        page.rows[row.index] = None
        page.used -= 1
        while page.rows and page.rows[-1] is None:
            page.rows.pop()
        if not page.rows:
            page.cap = 0

    def write_prefix(self, row: KvRow, lead: VirtualTokens) -> None:
        """Puts an adapter's trained keys and values at the front of an empty row; a lead without them is computed."""
        for layer, halves in enumerate(zip(lead.keys, lead.values, strict=True)):
            for view, half in zip(self.row_view(row, layer), halves, strict=True):
                view[:, : lead.count] = half
        row.length = lead.count if lead.keys else 0

    def close_gaps(self) -> None:
        """Moves the last row of a page into a gap, where it has several: decoding costs some calls per run of rows."""
        for page in self._pages:
            while len(page.rows) - page.used > 1:
                last = page.rows[-1]
                assert last is not None, "free() drops trailing gaps"
                self._move(last, self._take(page, page.rows.index(None)))

    def row_view(self, row: KvRow, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one row, each [Hkv, cap, D]."""
        heads, size = self.shapes[layer].heads, self.shapes[layer].head_dim
        lines = slice(row.start * heads, (row.start + row.cap) * heads)
        keys, values = self.keys[layer][lines], self.values[layer][lines]
        return keys.view(heads, row.cap, size), values.view(heads, row.cap, size)

    def run_view(self, row: KvRow, count: int, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `count` neighbouring rows from `row` on, each [count * Hkv, length, D]."""
        shape = self.shapes[layer]
        size = (count * shape.heads, length, shape.head_dim)
        stride = (row.cap * shape.head_dim, shape.head_dim, 1)
        start = row.start * shape.heads * shape.head_dim
        return self.keys[layer].as_strided(size, stride, start), self.values[layer].as_strided(size, stride, start)

    def _take(self, page: _Page, index: int) -> KvRow:
        row = KvRow(page.number, index, page.cap, page.number * self.page_tokens + index * page.cap)
        page.rows[index : index + 1] = [row]
        page.used += 1
        return row

    def _move(self, row: KvRow, target: KvRow) -> None:
        """Copies the row's tokens to `target`'s place; `row` stays the same object and now lives there."""
        for layer in range(len(self.shapes)):
            for source, sink in zip(self.row_view(row, layer), self.row_view(target, layer), strict=True):
                sink[:, : row.length].copy_(source[:, : row.length])
        self.free(row)
        self._replace(row, target)

    def _replace(self, row: KvRow, target: KvRow) -> None:
        row.page, row.index, row.cap, row.start = target.page, target.index, target.cap, target.start
        self._pages[row.page].rows[row.index] = row

    def _extend_page(self, row: KvRow, tokens: int) -> None:
        """Gives the page of a lone row a longer class, through a copy: no other page is free."""
        saved = [[view[:, : row.length].clone() for view in self.row_view(row, n)] for n in range(len(self.shapes))]
        self.free(row)
        target = self.allocate(tokens)
        assert target is not None, "an empty page holds the longest row"
        self._replace(row, target)
        for layer, halves in enumerate(saved):
            for view, half in zip(self.row_view(row, layer), halves, strict=True):
                view[:, : row.length] = half

    def _defragment(self) -> bool:
        """Empties the emptiest page whose rows fit into its class's other pages. False: nothing to gain."""
        for page in sorted((page for page in self._pages if page.cap), key=lambda page: page.used):
            limit = self.page_tokens // page.cap
            others = [other for other in self._pages if other.cap == page.cap and other is not page]
            if sum(limit - other.used for other in others) < page.used:
                continue
            for row in [row for row in page.rows if row is not None]:
                other = next(other for other in others if other.used < limit)
                free = other.rows.index(None) if None in other.rows else len(other.rows)
                self._move(row, self._take(other, free))
            return True
        return False


def _classes(max_len: int) -> tuple[int, ...]:
    """64, 96, 128, 192, 256, ... up to max_len: a row wastes at most a third of its class."""
    sizes = []
    size = _SMALLEST_CLASS
    while size < max_len:
        sizes += [size, size * 3 // 2]
        size *= 2
    return (*(size for size in sizes if size < max_len), max_len)


def longest_sequence(config: Any) -> tuple[int | None, str]:
    """(tokens, the rule that sets them); None: the config names no limit.

    transformers rotates all rows of a batch by one set of frequencies. "longrope" (Phi 3) takes another set as soon as
    the longest row passes its original length, so up to there no row changes its neighbours. "dynamic" takes another
    one beyond max_position_embeddings, where every base ends here. Layers of chunked attention (Llama-4) attend to all
    tokens of a request as long as it is one chunk.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and (longest is None or chunk < longest) and "chunked_attention" in (config.layer_types or ()):
        return chunk, f"beyond {chunk} tokens layers of this base attend to chunks, which the engine does not compute"
    rope = getattr(config, "rope_parameters", None) or {}
    for own in [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]:
        original = own.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
        if own.get("rope_type") == "longrope" and original and (longest is None or original < longest):
            return original, f"beyond {original} tokens this base's longrope rotates every row of the batch otherwise"
    return longest, f"the base takes sequences up to {longest} tokens"


BLOCK = 16
"""Tokens that are shared or not, together."""


def block_keys(version: str | None, tokens: Sequence[int], salt: str = "") -> list[bytes]:
    """Keys of the whole blocks of `tokens`, each over salt, version and every token before it (128-bit BLAKE2b)."""
    root = b"base" if version is None else b"v:" + version.encode()
    key = blake2b(root, digest_size=16, key=salt.encode()).digest()
    keys = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        text = b",".join(str(token).encode() for token in tokens[start : start + BLOCK])
        key = blake2b(key + text, digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixCache:
    """Blocks of computed KV, the least recently used dropped first. The engine's thread alone uses it.

    tokens: memory of the cache, next to the rows of `store`.
    """

    def __init__(self, store: KvStore, tokens: int) -> None:
        self._store, self._device = store, store.keys[0].device
        blocks = tokens // BLOCK
        self._free = list(range(blocks))
        self._index: OrderedDict[bytes, int] = OrderedDict()
        self._owner: dict[bytes, str | None] = {}
        arena = store.keys[0]
        self._layers = [
            tuple(arena.new_empty(blocks, shape.heads, BLOCK, shape.head_dim) for _ in range(2))
            for shape in store.shapes
        ]
        """Keys and values of each layer."""

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._index) * BLOCK

    def match(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks in the cache; they become the most recently used, the first one most of all."""
        count = 0
        while count < len(keys) and keys[count] in self._index:
            count += 1
        for key in reversed(keys[:count]):
            self._index.move_to_end(key)
        return count

    def fetch(self, keys: Sequence[bytes], row: KvRow) -> None:
        """Copies the blocks into the beginning of `row`; `match` has just found them all."""
        blocks = torch.tensor([self._index[key] for key in keys], device=self._device)
        row.length = len(keys) * BLOCK
        for layer, halves in enumerate(self._layers):
            for cached, view in zip(halves, self._store.row_view(row, layer), strict=True):
                fresh = view[:, : row.length].view(len(view), len(keys), BLOCK, -1)
                fresh.copy_(cached[blocks].transpose(0, 1))

    def insert(self, keys: Sequence[bytes], row: KvRow, version: str | None) -> None:
        """Adds the blocks of a computed prompt, dropping old ones for them but none of this prompt."""
        known = self.match(keys)
        wanted, protected = len(keys) - known, set(keys[:known])
        for key in list(self._index):
            if len(self._free) >= wanted:
                break
            if key not in protected:
                self._evict(key)
        places = self._free[::-1][:wanted]
        stop = known + len(places)
        if not places:
            return
        blocks = torch.tensor(places, device=self._device)
        for layer, halves in enumerate(self._layers):
            for cached, view in zip(halves, self._store.row_view(row, layer), strict=True):
                computed = view[:, : stop * BLOCK].view(len(view), stop, BLOCK, -1)
                cached[blocks] = computed[:, known:].transpose(0, 1)
        del self._free[-len(places) :]  # after the copies: an exception in one costs no block
        for key, place in reversed(list(zip(keys[known:stop], places, strict=True))):
            self._index[key] = place
            self._owner[key] = version
        self.match(keys[:stop])

    def drop(self, version: str) -> None:
        """Forgets every block of an adapter version."""
        for key in [key for key, owner in self._owner.items() if owner == version]:
            self._evict(key)

    def _evict(self, key: bytes) -> None:
        self._free.append(self._index.pop(key))
        del self._owner[key]
