"""Several documents a row, packed by best fit decreasing; none of them sees another.

The model is given positions that begin anew at each document and no attention mask: transformers (5.23,
masking_utils.find_packed_sequence_indices) then keeps documents apart. With a mask of ones it does not.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graftwork.storage import Store
from graftwork.training.rows.kept import KeptRows
from graftwork.training.rows.part import format_row_count
from graftwork.training.rows.token_rows import IGNORED, Rows, TokenRows
from graftwork.training.text_spec import Packing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackedRows:
    """Packs of whole documents. P packs, D documents; pack p holds `order_D[offsets_P1[p]:offsets_P1[p + 1]]`."""

    documents: TokenRows
    order_D: NDArray[np.int64]
    offsets_P1: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets_P1) - 1

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each pack."""
        return self._sums(self.documents.lengths_N)

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Trained tokens of each pack."""
        return self._sums(self.documents.scored_N)

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """A pack is one sequence."""
        return self.lengths_N

    def pack(self, index: int) -> NDArray[np.int64]:
        """The documents of a pack."""
        return self.order_D[self.offsets_P1[index] : self.offsets_P1[index + 1]]

    def digest(self) -> str:
        """sha256 hex over the documents and which stand together."""
        parts = (self.documents.digest().encode(), self.order_D.tobytes(), self.offsets_P1.tobytes())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """Input ids, positions and labels (B, T); padding on the right is a document of its own that nobody scores."""
        import torch

        width = int(self.lengths_N[list(indices)].max())
        ids_BT = np.full((len(indices), width), pad_id, dtype=np.int64)
        labels_BT = np.full((len(indices), width), IGNORED, dtype=np.int64)
        positions_BT = np.zeros((len(indices), width), dtype=np.int64)
        for place, index in enumerate(indices):
            start = 0
            for document in self.pack(int(index)):
                ids, trained = self.documents.row(int(document))
                end = start + len(ids)
                ids_BT[place, start:end] = ids
                labels_BT[place, start + 1 : end] = np.where(trained, ids, IGNORED)[1:]  # the first has no past
                positions_BT[place, start:end] = np.arange(len(ids))
                start = end
            positions_BT[place, start:] = np.arange(width - start)
        batch = {"input_ids": ids_BT, "position_ids": positions_BT, "labels": labels_BT}
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def shared(self, store: Store) -> "PackedRows":
        """The same packs of documents that workers of other machines can take from the store, where they are many."""
        return replace(self, documents=self.documents.shared(store)) if isinstance(self.documents, KeptRows) else self

    def _sums(self, of_D: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.add.reduceat(of_D[self.order_D], self.offsets_P1[:-1]) if len(self) else np.zeros(0, dtype=np.int64)


def pack_rows(rows: TokenRows, packing: Packing, max_length: int) -> tuple[Rows, tuple[str, ...]]:
    """The rows as the spec wants them, and a note on what packing gained. No row is longer than `max_length`."""
    if packing == "none":
        return rows, ()
    packs = best_fit(rows.lengths_N.tolist(), max_length)
    order_D = np.array([document for pack in packs for document in pack], dtype=np.int64)
    made = PackedRows(rows, order_D, np.cumsum([0, *map(len, packs)], dtype=np.int64))
    full = int(made.lengths_N.sum()) / (len(made) * max_length)
    return made, (
        f"packing=best_fit: {format_row_count(rows, 'document')} in {format_row_count(made, 'row')}, {full:.1%} full",
    )


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `lengths` in packs of at most `room`: the longest first, each into the fullest pack that holds it.

    Equal lengths give equal packs. At most 11/9 of the fewest packs possible, plus one (Johnson 1973).
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, pack), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[index] <= room, f"row {index} of {lengths[index]} tokens in packs of {room}"
        place = bisect.bisect_left(free, (lengths[index], -1))
        left, pack = free.pop(place) if place < len(free) else (room, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        bisect.insort(free, (left - lengths[index], pack))
    return [sorted(pack) for pack in packs]
