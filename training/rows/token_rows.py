"""Rows of token ids laid end to end, and the shape that the loop asks of all kinds of rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

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
