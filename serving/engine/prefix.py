"""Shares the KV of equal prompt beginnings. The key of a block is (salt, adapter version digest, all tokens up to its
end).

Two adapters, two versions of one, or two salts never share: version and salt are the root of the hash chain.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import torch

from graftwork.serving.engine.kv import KvRow, KvStore

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

    tokens: memory of the cache, beside the rows of `store`.
    """

    def __init__(self, store: KvStore, tokens: int) -> None:
        self._store = store
        blocks = tokens // BLOCK
        self._free = list(range(blocks))
        self._index: OrderedDict[bytes, int] = OrderedDict()
        self._owner: dict[bytes, str | None] = {}
        arena = store.keys[0]
        self._keys, self._values = (
            [arena.new_empty(blocks, shape.heads, BLOCK, shape.head_dim) for shape in store.shapes] for _ in range(2)
        )

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return len(self._index) * BLOCK

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are held; they become the most recently used, the first one most of all."""
        count = 0
        while count < len(keys) and keys[count] in self._index:
            count += 1
        for key in reversed(keys[:count]):
            self._index.move_to_end(key)
        return count

    def fetch(self, keys: Sequence[bytes], row: KvRow) -> None:
        """Copies the blocks into the beginning of `row`; `match` has just found them all."""
        blocks = self._tensor([self._index[key] for key in keys])
        for layer in range(len(self._store.shapes)):
            k, v = self._store.row_view(row, layer)
            self._blocked(k, len(keys)).copy_(self._keys[layer][blocks].transpose(0, 1))
            self._blocked(v, len(keys)).copy_(self._values[layer][blocks].transpose(0, 1))
        row.length = len(keys) * BLOCK

    def insert(self, keys: Sequence[bytes], row: KvRow, version: str | None) -> None:
        """Keeps the blocks of a computed prompt that are not held yet."""
        held = self.match(keys)
        places = self._make_room(len(keys) - held, protected=set(keys[:held]))
        fresh = keys[held : held + len(places)]
        if not fresh:
            return
        blocks = self._tensor(places)
        for layer in range(len(self._store.shapes)):
            k, v = self._store.row_view(row, layer)
            self._keys[layer][blocks] = self._blocked(k, held + len(fresh))[:, held:].transpose(0, 1)
            self._values[layer][blocks] = self._blocked(v, held + len(fresh))[:, held:].transpose(0, 1)
        for key, place in reversed(list(zip(fresh, places, strict=True))):
            self._index[key] = place
            self._owner[key] = version
        self.match(keys[: held + len(fresh)])

    def drop(self, version: str) -> None:
        """Forgets every block of an adapter version."""
        for key in [key for key, owner in self._owner.items() if owner == version]:
            self._evict(key)

    def _make_room(self, wanted: int, protected: set[bytes]) -> list[int]:
        """Up to `wanted` free places, dropping old blocks but none of `protected`."""
        for key in list(self._index):
            if len(self._free) >= wanted:
                break
            if key not in protected:
                self._evict(key)
        count = min(wanted, len(self._free))
        return [self._free.pop() for _ in range(count)]

    def _evict(self, key: bytes) -> None:
        self._free.append(self._index.pop(key))
        del self._owner[key]

    @staticmethod
    def _blocked(row_view: torch.Tensor, count: int) -> torch.Tensor:
        """[Hkv, cap, D] -> the first `count` blocks as [Hkv, count, BLOCK, D], a view."""
        heads, _, size = row_view.shape
        return row_view[:, : count * BLOCK].view(heads, count, BLOCK, size)

    def _tensor(self, places: Sequence[int]) -> torch.Tensor:
        return torch.tensor(places, device=self._store.keys[0].device)
