"""Token rows, and the cache of rendered rows: found by a digest of their sources, mapped from disk where large.

    <cache>/tokens/<key>/{ids.bin, trained.bin, offsets.bin, about.json}

Small sets travel with the job. Of a set past `INLINE_BYTES` only its place does: a worker maps the files of its
machine, copied from `<root>/tokens/<key>` where they are not there.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graftwork.storage.local import build_once
from graftwork.storage.store import Store, cache_root

if TYPE_CHECKING:
    import torch


IGNORED = -100  # torch's cross-entropy leaves these targets out


class Rows(Protocol):
    """What the loop asks of a set of rows, whatever one row is: a conversation, a pack, a pair, a prompt. Picklable."""

    def __len__(self) -> int: ...

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens that the model computes for each row: what steps are balanced by."""
        ...

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Positions of each row whose logits are computed."""
        ...

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """Tokens of each row's longest sequence, which the others of a batch are padded to."""
        ...

    def digest(self) -> str:
        """sha256 hex over what the model sees."""
        ...

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """A batch of these rows, in the form that the kind's trainer takes. In a worker."""
        ...


@dataclass(frozen=True)
class TokenRows:
    """Rows laid end to end. N rows, T tokens over all; row i is `[offsets_N1[i], offsets_N1[i + 1])`."""

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    """True where the token is a target of the loss."""
    offsets_N1: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets_N1)

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Trained tokens of each row."""
        return np.add.reduceat(self.trained_T, self.offsets_N1[:-1], dtype=np.int64)

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """A row is one sequence."""
        return self.lengths_N

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask of one row."""
        start, end = self.offsets_N1[index], self.offsets_N1[index + 1]
        return self.ids_T[start:end], self.trained_T[start:end]

    def digest(self) -> str:
        """sha256 hex over ids, masks and row borders."""
        parts = (self.ids_T, self.trained_T, self.offsets_N1)
        return hashlib.sha256(b"".join(hashlib.sha256(part.data).digest() for part in parts)).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """Input ids, attention mask and labels (B, T), padded on the right to the batch's longest row."""
        import torch

        width = int(max(self.lengths_N[i] for i in indices))
        ids_BT = torch.full((len(indices), width), pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(indices), width), dtype=torch.long)
        labels_BT = torch.full((len(indices), width), IGNORED, dtype=torch.long)
        for place, index in enumerate(indices):
            ids, trained = self.row(int(index))
            ids_BT[place, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            mask_BT[place, : len(ids)] = 1
            labels_BT[place, : len(ids)] = torch.from_numpy(np.where(trained, ids, IGNORED).astype(np.int64))
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}

    @classmethod
    def from_pairs(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> "TokenRows":
        """From (ids, mask) pairs."""
        return cls(
            np.array([token for ids, _ in rows for token in ids], dtype=np.int32),
            np.array([trained for _, mask in rows for trained in mask], dtype=np.bool_),
            np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
        )


INLINE_BYTES = 64 * 2**20
"""Most bytes of a set that is sent whole to every worker."""
FLUSH_TOKENS = 1 << 20
FOLDER = "tokens"


class RowWriter:
    """Takes rows one after another; no more than `FLUSH_TOKENS` of them wait in memory."""

    def __init__(self, folder: Path) -> None:
        self._ids, self._trained = (folder / "ids.bin").open("wb"), (folder / "trained.bin").open("wb")
        self._waiting: tuple[list[int], list[bool]] = ([], [])
        self._offsets, self._folder = [0], folder

    def add(self, ids: Sequence[int], trained: Sequence[bool]) -> None:
        """One row, behind those before it."""
        self._waiting[0].extend(ids)
        self._waiting[1].extend(trained)
        self._offsets.append(self._offsets[-1] + len(ids))
        if len(self._waiting[0]) >= FLUSH_TOKENS:
            self._flush()

    def close(self, about: dict[str, Any]) -> None:
        """Write what waits, where the rows begin, and `about`."""
        self._flush()
        self._ids.close()
        self._trained.close()
        np.array(self._offsets, dtype=np.int64).tofile(self._folder / "offsets.bin")
        (self._folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _flush(self) -> None:
        ids, trained = self._waiting
        np.array(ids, dtype=np.int32).tofile(self._ids)
        np.array(trained, dtype=np.bool_).tofile(self._trained)
        self._waiting = ([], [])


@dataclass(frozen=True)
class KeptRows(TokenRows):
    """Token rows in files. Sent to another process as their key and the root that has a copy."""

    key: str = ""
    root: str | None = None

    def __reduce__(self) -> tuple[Callable[..., TokenRows], tuple[object, ...]]:
        return open_rows, (self.key, self.root)

    def shared(self, store: Store) -> "KeptRows":
        """The same rows, with a copy in the store that other machines can take. Runs in the driver, before workers."""
        if not store.exists(FOLDER, self.key, "about.json"):
            folder = cache_root() / FOLDER / self.key
            for name in ("ids.bin", "trained.bin", "offsets.bin", "about.json"):  # the last says that all are there
                store.upload(folder / name, FOLDER, self.key, name)
        return KeptRows(self.ids_T, self.trained_T, self.offsets_N1, self.key, store.uri)


def kept_rows(key: str, build: Callable[[RowWriter], dict[str, Any]]) -> tuple[TokenRows, dict[str, Any]]:
    """The rows of a key and what was noted of them; rendered by `build` the first time. `build` gives the note."""

    def fill(folder: Path) -> None:
        writer = RowWriter(folder)
        writer.close(build(writer))

    folder = build_once(cache_root() / FOLDER / key, fill)
    return open_rows(key, None), json.loads((folder / "about.json").read_text(encoding="utf-8"))


def open_rows(key: str, root: str | None) -> TokenRows:
    """The rows of a key: of this machine's cache, else of the root's copy. Large ones are mapped and not read."""

    def fetch(folder: Path) -> None:
        assert root is not None, f"token rows {key} are in no store"
        Store(root).download(folder, FOLDER, key)

    folder = build_once(cache_root() / FOLDER / key, fetch)
    offsets = np.fromfile(folder / "offsets.bin", dtype=np.int64)
    ids, trained = folder / "ids.bin", folder / "trained.bin"
    if offsets[-1] * 5 <= INLINE_BYTES:
        return TokenRows(np.fromfile(ids, dtype=np.int32), np.fromfile(trained, dtype=np.bool_), offsets)
    return KeptRows(
        np.memmap(ids, dtype=np.int32, mode="r"),
        np.memmap(trained, dtype=np.bool_, mode="r"),
        offsets,
        key,
        root,
    )
